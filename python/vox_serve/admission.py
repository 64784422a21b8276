"""Whether one more request can be served, and how long it has to wait: without a clock."""

from collections.abc import Iterable, Sequence
from math import ceil, inf, sqrt
from operator import attrgetter

import numpy as np

from vox_serve.deadlines import FRAME_S, WHOLE_FRAME_S, Row
from vox_serve.speech_lengths import START_SPREAD
from vox_serve.step_times import StepTimes

CAUTION = 2.0
"""All speech together may take so many standard deviations longer than expected."""

UNKNOWN_FRAMES = 125.0
"""Frames left, for a prediction, of speech of which nobody knows the length."""

WAIT_MARGIN = 1.25
"""Places become free so much later than the speech in them is expected to end."""

WHOLE_WEIGHT = FRAME_S / WHOLE_FRAME_S
"""Frames of a whole answer in the time of one frame of a stream."""

MAX_LOAD = 0.7
"""Most of the time that the frames of admitted requests may take. Streams with gaps on two cores at
twice their capacity, before lengths were learnt: 0 of 128 and 2 of 138 at 0.7, 8 of 153 at 0.77,
53 of 224 at 0.85."""


def can_admit(
    rows: Iterable[Row],
    now_s: float,
    times: StepTimes,
    streams: bool = True,
    frames: float = inf,
    spread: float = START_SPREAD,
    speed: float = 1.0,
) -> bool:
    """True if one more request leaves time for all frames of the live streams.

    At every later time the frames that are due until then must be made by then: those of a stream
    from the end of the audio in hand until its own end. The step that makes a frame of each such
    stream is paid every 80 ms, or as often as its listener's tempo needs it.

    Args:
        rows: all live requests.
        now_s: the time by the caller's clock.
        times: how long steps take.
        streams: the request's listener hears it while it is spoken.
        frames: expected length of its speech; infinite if unknown.
        spread: standard deviation of actual over expected length of speech.
        speed: tempo at which the request's listener hears it.
    """
    rows = list(rows)
    slow = CAUTION * spread / sqrt(len(rows) + 1)  # lengths of many vary less than each
    weight = speed if streams else WHOLE_WEIGHT
    starts_s, ends_s, weights = _speech(rows, now_s, inf, slow, spread)
    at = np.concatenate([starts_s, [0.0], ends_s, [frames * (1 + slow) * FRAME_S / weight]])
    change = np.concatenate([weights, [weight], -weights, [-weight]])
    order = np.argsort(at, kind="stable")
    at, active = at[order], np.cumsum(change[order])
    table = times.lately * times.table(ceil(max(len(rows), active.max())) + 2)
    cost = (np.interp(active, np.arange(len(table)), table) + active * times.prompt_s) / FRAME_S
    lasts = np.isfinite(at)
    at, cost = at[lasts], cost[lasts]
    # Between two events the time that is needed grows in a straight line.
    needed_s = np.concatenate([[0.0], np.cumsum(cost[:-1] * np.diff(at))])
    allowed = needed_s <= MAX_LOAD * at + 1e-9
    return bool(allowed.all() and cost[-1] <= MAX_LOAD)


def wait_s(rows: Sequence[Row], now_s: float, times: StepTimes, num_ahead: int = 0) -> float:
    """Predicted seconds until a request gets its place, if all places are taken now.

    A place becomes free when its speech is made, which may be long before it is played. The
    prediction gives all rows equally many frames.

    Args:
        rows: all live requests.
        now_s: the time by the caller's clock.
        times: how long steps take.
        num_ahead: requests that wait before it.
    """
    if not rows:
        return 0.0
    starts_s, ends_s, weights = _speech(rows, now_s, UNKNOWN_FRAMES)
    left = np.sort((ends_s - starts_s) * weights / FRAME_S)
    sizes = np.arange(1, len(rows) + 1)
    frame_s = np.min(times.table(len(rows))[1 : len(rows) + 1] / sizes) + times.prompt_s
    made_s = frame_s * (np.cumsum(left) + left * (len(rows) - sizes))
    ends_s = np.minimum(np.sort(ends_s), made_s)
    rounds, place = divmod(num_ahead, len(rows))
    return WAIT_MARGIN * float(ends_s[place] + rounds * ends_s.mean())


def _speech(
    rows: Sequence[Row], now_s: float, unknown: float, slow: float = 0.0, late: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """When the audio in hand of each row ends, when its speech ends, and frames each 80 ms.

    Args:
        rows: live requests.
        now_s: the time by the caller's clock, from which on both times count.
        unknown: frames that a row has left if their number is unknown.
        slow: speech takes so much longer than expected.
        late: what is longer already goes on for this share of its length.
    """
    due_s, expected, made, frame_s = (
        np.fromiter(map(attrgetter(name), rows), float, len(rows))
        for name in ("due_s", "frames_expected", "num_frames", "frame_s")
    )
    streams = np.fromiter(map(attrgetter("streams"), rows), bool, len(rows))
    weights = np.where(streams, FRAME_S / frame_s, WHOLE_WEIGHT)
    starts_s = np.where(np.isfinite(due_s) & streams, np.maximum(due_s - now_s, 0.0), 0.0)
    left = np.maximum((1 + slow) * expected - made, late * made)
    left = np.where(np.isfinite(left), left, unknown)
    return starts_s, starts_s + left * FRAME_S / weights, weights
