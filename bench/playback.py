"""The listener's side of a stream: when it plays, and when it falls silent.

Playback starts when the first chunk arrives, without a buffer. When the received audio runs out
before the next chunk arrives, the listener hears a gap: an underrun. All times are in seconds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Chunk = tuple[float, float]
"""Arrival time, and duration of the audio."""


@dataclass(frozen=True)
class Playback:
    """A stream as it was played.

    Attributes:
        audio_s: duration of the audio, without gaps.
        underruns: number of gaps.
        gap_s: duration of all gaps.
        longest_gap_s: duration of the longest gap.
        least_slack_s: least audio that was left to play when a chunk arrived, apart from the first;
            negative in an underrun; infinity with fewer than two chunks.
    """

    audio_s: float
    underruns: int
    gap_s: float
    longest_gap_s: float
    least_slack_s: float


def play(chunks: Iterable[Chunk]) -> Playback:
    """Play chunks in the order of their arrival."""
    audio_s = ends_s = 0.0
    slacks: list[float] = []
    for index, (at_s, duration_s) in enumerate(chunks):
        if index:
            slacks.append(ends_s - at_s)
        ends_s = max(ends_s, at_s) + duration_s if index else at_s + duration_s
        audio_s += duration_s
    gaps = [-slack for slack in slacks if slack < 0]
    return Playback(
        audio_s, len(gaps), sum(gaps), max(gaps, default=0.0), min(slacks, default=math.inf)
    )


def heard_at(chunks: Sequence[Chunk], offset_s: float) -> float:
    """Time at which the audio at an offset from the stream's start is played.

    Raises:
        ValueError: the stream is shorter.
    """
    ends_s = -math.inf
    for at_s, duration_s in chunks:
        starts_s = max(ends_s, at_s)
        if offset_s < duration_s:
            return starts_s + offset_s
        offset_s -= duration_s
        ends_s = starts_s + duration_s
    raise ValueError("the stream ends before this offset")


def audio_between(chunks: Iterable[Chunk], start_s: float, end_s: float) -> float:
    """Seconds of audio that arrived from `start_s` to before `end_s`."""
    return sum(duration_s for at_s, duration_s in chunks if start_s <= at_s < end_s)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of the values do not exceed; None without any."""
    if not values:
        return None
    return sorted(values)[max(math.ceil(percent / 100 * len(values)), 1) - 1]
