"""The numbers of `/health` and `/metrics`, cheap to count."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from vox_serve.deadlines import FRAME_S

FIRST_AUDIO_S = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60)
REAL_TIME_FACTORS = (
    0.01,
    0.02,
    0.05,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    1,
    1.5,
    2,
    5,
)
STEPS_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.048, 0.064, 0.08, 0.12,
           0.16, 0.32, 0.64, 1.28, 2.56)  # fmt: skip


class Histogram:
    """Counts values by upper bound. One thread at a time observes; any thread may read.

    Args:
        bounds: upper bounds, ascending; values above the last one are counted too.

    Attributes:
        counts: values by bucket, not cumulative; one bucket more than there are bounds.
        sum: of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass
class Playback:
    """When a stream's listener needs the next frame: playback begins with the first frame, goes on
    in real time, and pauses where a frame is missing.

    Attributes:
        due_s: time of the next frame, by the caller's clock.
        frame_s: time in which a frame is played.
    """

    due_s: float = math.inf
    frame_s: float = FRAME_S

    def arrive(self, now_s: float) -> float:
        """Count a frame; returns the seconds that the listener waited for it."""
        late_s = max(now_s - self.due_s, 0.0)
        is_first = self.due_s == math.inf
        self.due_s = (now_s if is_first or late_s else self.due_s) + self.frame_s
        return late_s


@dataclass
class Measures:
    """Counted since the start. The engine's thread writes, but for the first audio.

    Attributes:
        first_audio_s: seconds from a stream's submission to its first frame (the event loop's).
        stream_factors, whole_factors: seconds that speech took from the beginning of its first step
            to its last frame, over its length.
        steps_s: seconds of a step.
        num_frames: frames that were made, 80 ms each.
        num_underruns: frames of streams that came after the listener had played all before them.
        underruns_s: seconds that listeners waited for these.
    """

    first_audio_s: Histogram = field(default_factory=lambda: Histogram(FIRST_AUDIO_S))
    stream_factors: Histogram = field(default_factory=lambda: Histogram(REAL_TIME_FACTORS))
    whole_factors: Histogram = field(default_factory=lambda: Histogram(REAL_TIME_FACTORS))
    steps_s: Histogram = field(default_factory=lambda: Histogram(STEPS_S))
    num_frames: int = 0
    num_underruns: int = 0
    underruns_s: float = 0.0

    def frame(self, listener: Playback | None, now_s: float) -> None:
        """Count a frame.

        Args:
            listener: of a stream; None for a whole answer.
            now_s: the time.
        """
        self.num_frames += 1
        if listener is not None and (late_s := listener.arrive(now_s)):
            self.num_underruns += 1
            self.underruns_s += late_s

    def spoken(self, seconds: float, num_frames: int, streaming: bool) -> None:
        """Count speech that has ended."""
        if num_frames:
            factors = self.stream_factors if streaming else self.whole_factors
            factors.observe(seconds / (num_frames * FRAME_S))


@dataclass
class Counts:
    """Requests since the start.

    Attributes:
        finished: spoken, by finish reason.
        cancelled: given up by their clients.
        failed: ended by an exception or by numbers that are not finite.
        non_finite: the latter of these.
        refused: answered 429.
        stalled: dropped because nobody read their audio.
        recoveries: failed steps after which the engine went on.
    """

    finished: dict[str, int] = field(default_factory=dict)
    cancelled: int = 0
    failed: int = 0
    non_finite: int = 0
    refused: int = 0
    stalled: int = 0
    recoveries: int = 0
