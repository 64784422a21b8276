"""Tell whether audio files are marked as synthetic speech: in their metadata, or by a watermark.

vox-serve detect speech.mp3
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vox_serve.cli import CommandError, CommandParser, one_line, run_command
from vox_serve.console import standard_streams

PROG = "detect"

EXIT_UNMARKED = 1
EXIT_UNREADABLE = 2

TERM = "trainedAlgorithmicMedia"
"""The end of IPTC's terms for media that a trained model made, or had a part in."""

NOTE = "AI-generated"

RATE_HZ = 24_000
WINDOW_S = 10
"""Audio that is looked at together."""
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000

MIN_SCORE = 0.5
"""The decoder's own bound."""


@dataclass(frozen=True)
class Marks:
    """The marks of a file.

    Attributes:
        metadata: those that say that it is synthetic, by name.
        score: the certainty of the watermark's decoder, 0 to 1; None if it could not look.
    """

    metadata: dict[str, str]
    score: float | None

    @property
    def has_watermark(self) -> bool:
        return self.score is not None and self.score >= MIN_SCORE

    @property
    def is_marked(self) -> bool:
        return bool(self.metadata) or self.has_watermark


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        PROG,
        description="Tell whether audio files are marked as synthetic speech.",
        usage="vox-serve detect FILE...",
        epilog="Exit code 0: all files are marked, in their metadata or by a watermark. "
        f"{EXIT_UNMARKED}: one is not. {EXIT_UNREADABLE}: one cannot be read. Without the package "
        "resemble-perth no watermark is looked for.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio of any format")
    parser.add_flag("json", action="store_true", help="print a JSON object for each file")
    return parser


@standard_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = make_parser().parse_args(argv)
    return run_command(PROG, lambda: _detect(args.files, args.json))


def _detect(paths: Sequence[str], as_json: bool) -> int:
    code = 0
    for path in paths:
        try:
            marks = find_marks(path)
        except CommandError as error:
            print(f"{PROG}: error: {one_line(error)}", file=sys.stderr)
            code = EXIT_UNREADABLE
            continue
        print(_as_json(path, marks) if as_json else _as_text(path, marks), flush=True)
        if not marks.is_marked and not code:
            code = EXIT_UNMARKED
    return code


def find_marks(path: str | Path) -> Marks:
    """Look for marks in an audio file.

    Raises:
        CommandError: it cannot be read, or has no audio.
    """
    import av

    metadata: dict[str, str] = {}
    scores: list[float] = []
    score = _score()
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise CommandError(f"{path}: it has no audio")
            stream = container.streams.audio[0]
            metadata = _own({**container.metadata, **stream.metadata})
            if score is not None:
                scores = [score(window) for window in _windows(container, stream)]
    except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: the layout changes
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot read {path}: {reason}") from None
    return Marks(metadata, None if score is None else max(scores, default=0.0))


def _score() -> Callable[[Any], float] | None:
    """The watermark's decoder; None if it is not installed."""
    from vox_serve import watermark_net

    try:
        watermark_net.load_weights()
    except watermark_net.WatermarkMissing:
        return None
    return watermark_net.score


def _own(metadata: dict[str, str]) -> dict[str, str]:
    """The entries that call the audio synthetic."""
    return {
        name: value for name, value in metadata.items() if value.endswith(TERM) or NOTE in value
    }


def _windows(container: Any, stream: Any) -> Iterator[Any]:
    """The audio at 24 kHz, mono, in tensors of `WINDOW_S`; a short rest goes with the last one."""
    import numpy as np
    import torch
    from av.audio.resampler import AudioResampler

    if not MIN_RATE_HZ <= stream.rate <= MAX_RATE_HZ:
        raise ValueError(f"its sample rate is {stream.rate} Hz")
    resampler = AudioResampler("flt", "mono", RATE_HZ)
    size = WINDOW_S * RATE_HZ
    have = np.zeros(0, np.float32)
    for frame in chain(container.decode(stream), [None]):
        for part in resampler.resample(frame):
            have = np.concatenate([have, np.nan_to_num(part.to_ndarray().reshape(-1))])
        while len(have) >= 2 * size:
            yield torch.from_numpy(have[:size])
            have = have[size:]
    if len(have):
        yield torch.from_numpy(have)


def _as_text(path: str, marks: Marks) -> str:
    found = [*(["metadata"] if marks.metadata else []), *(["watermark"] * marks.has_watermark)]
    lines = [f"{path}: " + (f"synthetic ({', '.join(found)})" if found else "no mark found")]
    lines += [f"  {name}: {one_line(value)}" for name, value in marks.metadata.items()]
    if marks.score is None:
        lines.append("  watermark: not looked for, since resemble-perth is not installed")
    else:
        word = "found" if marks.has_watermark else "not found"
        lines.append(f"  watermark: {word} ({marks.score:.2f})")
    return "\n".join(lines)


def _as_json(path: str, marks: Marks) -> str:
    return json.dumps(
        {
            "file": path,
            "synthetic": marks.is_marked,
            "metadata": marks.metadata,
            "watermark": None if marks.score is None else marks.has_watermark,
            "score": None if marks.score is None else round(marks.score, 3),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
