"""The progress of `say` on a terminal, with its real-time factor."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

from vox_serve.deadlines import FRAME_S


class Progress:
    """A bar on stderr, if that is a terminal; use it inside `with`.

    Args:
        num_parts: parts of the text; one part is counted in frames.
        max_frames: most frames; None if unknown.
    """

    def __init__(self, num_parts: int, max_frames: int | None) -> None:
        self._is_long = num_parts > 1
        self._is_shown = sys.stderr.isatty()
        self._num_frames = 0
        self._begun_s = time.monotonic()
        self._bar = tqdm(
            total=num_parts if self._is_long else max_frames,
            unit="part" if self._is_long else "frame",
            disable=not self._is_shown,
            leave=False,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def frame(self, part: int) -> None:
        """Count a frame of a part."""
        self._num_frames += 1
        self._bar.set_postfix_str(self._factor(), refresh=False)
        self._bar.update(part - self._bar.n if self._is_long else 1)

    def end(self) -> None:
        """Replace the bar by a line about the whole."""
        self._bar.close()
        if self._is_shown and self._num_frames:
            seconds = self._num_frames * FRAME_S
            print(f"{seconds:.1f} s of speech, {self._factor()}", file=sys.stderr)

    def _factor(self) -> str:
        elapsed_s = time.monotonic() - self._begun_s
        return f"real-time factor {elapsed_s / (self._num_frames * FRAME_S):.2f}"
