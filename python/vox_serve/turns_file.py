"""A conversation in a file: `say` speaks the next turn, and adds it.

The file is a context.json (see `load_context`); the codes of each turn are a .npy file beside it.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from vox_serve.atomic_file import atomic_write, sync
from vox_serve.cli import CommandError
from vox_serve.json_file import read_json_file

if TYPE_CHECKING:
    import numpy as np

    from vox_serve.long_form import LongForm
    from vox_serve.mimi import Mimi
    from vox_serve.model_config import CsmConfig
    from vox_serve.prompt import Segment
    from vox_serve.request import Prompt, Request


class Turn(NamedTuple):
    """A turn that was spoken.

    Attributes:
        speaker: id of the speaker.
        text: as the model read it.
        codes: `[N, K]` int64.
    """

    speaker: int
    text: str
    codes: "np.ndarray"


def load_turns(path: Path, mimi: "Mimi", config: "CsmConfig", max_chars: int) -> "list[Segment]":
    """The turns of a file, oldest first; none if it does not exist.

    Args:
        path: the file.
        mimi, config: see `load_context`.
        max_chars: longest text of a turn.

    Raises:
        ContextError: the file or an entry is invalid.
    """
    from vox_serve.context_file import load_context

    return load_context(path, mimi, config, max_chars) if path.exists() else []


def fitting(
    engine: "LongForm", request: "Request", num_fixed: int
) -> "tuple[Request, Prompt, int]":
    """A request without the oldest turns of its context that leave no room for speech.

    Args:
        engine: speaks the request.
        request: its context has fixed segments, then turns, oldest first.
        num_fixed: number of segments that must stay.

    Returns:
        The request, its prompt, and the number of turns that were left out.

    Raises:
        PromptTooLongError: it does not fit without any turn.
        ValueError: see `Engine.prepare`.
    """
    from vox_serve.prompt import PromptTooLongError

    context = list(request.context or ())
    for num_left_out in range(len(context) - num_fixed):
        kept = replace(request, context=context[:num_fixed] + context[num_fixed + num_left_out :])
        try:
            return kept, engine.prepare(kept), num_left_out
        except PromptTooLongError:
            continue
    if request.context is not None:
        request = replace(request, context=context[:num_fixed])
    return request, engine.prepare(request), max(len(context) - num_fixed, 0)


def turns_of(
    engine: "LongForm",
    request: "Request",
    prompt: "Prompt",
    codes: "np.ndarray",
    part_frames: Mapping[int, int],
) -> list[Turn]:
    """The turns that a request has spoken, one for each part of a long text.

    Args:
        engine: has spoken it.
        request, prompt: were spoken.
        codes: `[N, K]`, all frames.
        part_frames: number of frames by part.
    """
    texts = prompt.parts or (request.text,)
    turns, start = [], 0
    for part, count in sorted(part_frames.items()):
        text = engine.spoken_text(replace(request, text=texts[part]))
        turns.append(Turn(request.speaker, text, codes[start : start + count]))
        start += count
    return turns


def append_turns(path: Path, turns: Sequence[Turn]) -> None:
    """Add turns to a file, which is made if it does not exist.

    The codes are written first: the file never names one that does not exist.

    Raises:
        CommandError: a file cannot be written.
        ValueError: the file is no list any more.
    """
    import numpy as np

    entries = read_json_file(path, any_kind=True) if path.exists() else []
    if not isinstance(entries, list):
        raise ValueError(f"{path}: must be a list of segments")
    for turn in turns:
        number = len(entries) + 1
        while (codes := path.with_name(f"{path.stem}-{number}.npy")).exists():
            number += 1
        data = io.BytesIO()
        np.save(data, turn.codes)
        _write(codes, data.getvalue())
        entries.append({"speaker": turn.speaker, "text": turn.text, "codes": codes.name})
    _write(path, json.dumps(entries, indent=1, ensure_ascii=False).encode() + b"\n")


def _write(path: Path, data: bytes) -> None:
    file: IO[bytes]
    try:
        with atomic_write(path) as file:
            file.write(data)
            sync(file)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
