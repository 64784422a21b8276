"""Say a text into a WAV file, without a server.

python -m vox_serve.say "Hello." -o hello.wav
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vox_serve.cli import CommandError, CommandParser, run_command
from vox_serve.config import Config, ModelSettings, SpeechSettings
from vox_serve.speech import make_engine
from vox_serve.text_bound import check_length

if TYPE_CHECKING:
    import numpy as np

    from vox_serve.engine import Engine, Request

PROG = "say"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = CommandParser(
        PROG,
        description="Say a text into a 24 kHz mono WAV file.",
        usage='python -m vox_serve.say ["text"] -o out.wav [flags]',
    )
    parser.add_argument("text", nargs="?", help="text to say; read from stdin if not given")
    parser.add_argument("-o", "--output", metavar="WAV", help="the file to write; - is stdout")
    parser.add_flag("codes", metavar="NPY", help="write the frames too, int64 [N, K]")
    parser.add_flag(
        "speaker", type=int, choices=(0, 1), default=0, help="id of the voice [default 0]"
    )
    parser.add_flag("greedy", action="store_true", help="same as --temperature 0")
    parser.add_settings(ModelSettings, SpeechSettings)
    args, config = parser.parse(argv)
    if args.output is None and args.codes is None:
        parser.error("give -o out.wav")
    if args.greedy and config.temperature and "temperature" in args:
        parser.error("--greedy is --temperature 0: give one of the two")
    if args.greedy:
        config = config.model_copy(update={"temperature": 0.0})
    text = args.text if args.text is not None else _read_stdin()
    if problem := _text_problem(text, config.max_text_chars):
        parser.error(problem)
    return run_command(PROG, lambda: _say(text, args.speaker, args.output, args.codes, config))


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print("type what to say, then ctrl-D:", file=sys.stderr)
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    return text.removesuffix("\n").removesuffix("\r")


def _text_problem(text: str, max_chars: int) -> str | None:
    try:
        check_length(text, max_chars)
    except ValueError as error:
        return str(error)
    if not text.strip():
        return "there is no text to say"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text is not UTF-8"
    return None


def _say(
    text: str, speaker: int, output: str | None, codes_path: str | None, config: Config
) -> int:
    for path in (output, codes_path):  # fail before the long work, not after it
        if path is not None and path != "-":
            _check_writable(Path(path))

    import numpy as np

    from vox_serve.audio import pcm16, wav_file
    from vox_serve.engine import Request

    engine = make_engine(config.model_copy(update={"max_batch_size": 1}))
    request = Request(
        text=text,
        speaker=speaker,
        sampling=config.sampling,
        max_frames=config.max_frames,
    )
    from tqdm import tqdm

    with tqdm(
        total=config.max_frames, unit="frame", disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        audio, codes = speak(engine, request, bar.update)
    if codes_path is not None:
        with open(codes_path, "wb") as file:
            np.save(file, codes)
    if output is not None:
        wav = wav_file(pcm16(audio).tobytes(), engine.sample_rate_hz)
        if output == "-":
            sys.stdout.buffer.write(wav)
            sys.stdout.buffer.flush()
        else:
            Path(output).write_bytes(wav)
    return 0


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise CommandError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise CommandError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"cannot write {path}: permission denied")


def speak(
    engine: "Engine", request: "Request", on_frame: Callable[[], object] = lambda: None
) -> "tuple[np.ndarray, np.ndarray]":
    """Run one request to its end on an idle engine.

    Args:
        engine: the engine, without other requests.
        request: the request to run.
        on_frame: called after every frame.

    Returns:
        Samples `[S]` float32, and frames `[N, K]` int64; S and N may be 0.

    Raises:
        ValueError: the engine rejects the request.
    """
    import numpy as np

    engine.add(request)
    audio, codes = [np.zeros(0, np.float32)], [np.zeros((0, engine.num_codebooks), np.int64)]
    while engine.has_work:
        for output in engine.step():
            if output.codes is not None and output.audio is not None:
                audio.append(output.audio)
                codes.append(output.codes.numpy()[None])
                on_frame()
    return np.concatenate(audio), np.concatenate(codes)


if __name__ == "__main__":
    sys.exit(main())
