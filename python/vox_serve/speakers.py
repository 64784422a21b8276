"""The number of speakers of a model that is on this machine, before it is loaded."""

from pathlib import Path

from vox_serve.json_file import read_json_file


def known_speakers(model: str) -> int | None:
    """The number of speakers in a model's config.json; None if it is not here or says nothing.

    Args:
        model: built-in voice, local folder, or hub id.
    """
    folders = (Path(__file__).parent / "builtin" / model, Path(model).expanduser())
    for folder in folders:
        try:
            number = read_json_file(folder / "config.json").get("num_speakers")
        except (OSError, ValueError, RuntimeError, AttributeError):  # the loader says what is wrong
            continue
        return number if type(number) is int and number > 0 else None
    return None
