"""Whether one more request can be served, and how long it has to wait: without a clock."""

from collections.abc import Iterable, Sequence
from math import inf

import numpy as np

from vox_serve.policy import FRAME_S, WHOLE_FRAME_S, Row
from vox_serve.step_times import StepTimes

MAX_LOAD = 0.9
"""Share of the time that the frames due may take for a request to be admitted."""


def can_admit(
    rows: Iterable[Row], now_s: float, times: StepTimes, streams: bool = True, frames: float = inf
) -> bool:
    """True if one more request leaves time for all frames of the live streams.

    At every later time the frames that are due until then must be made by then: those of a stream
    from the end of the audio in hand until its own end. The step that makes a frame of each such
    stream is paid every 80 ms.

    Args:
        rows: all live requests.
        now_s: the time by the caller's clock.
        times: how long steps take.
        streams: the request's listener hears it while it is spoken.
        frames: expected length of its speech; infinite if unknown.
    """
    starts, ends, weights = [0.0], [frames * FRAME_S], [_weight(streams)]
    for row in rows:
        start = 0.0 if row.is_new or not row.streams else max(row.due_s - now_s, 0.0)
        starts.append(start)
        ends.append(start + row.frames_left * FRAME_S)
        weights.append(_weight(row.streams))
    at = np.array(starts + ends)
    change = np.array(weights + [-weight for weight in weights])
    order = np.argsort(at, kind="stable")
    at, active = at[order], np.cumsum(change[order])
    table = times.table(len(starts) + 1)
    cost = np.interp(active, np.arange(len(table)), table) / FRAME_S
    lasts = np.isfinite(at)
    at, cost = at[lasts], cost[lasts]
    # Between two events the time that is needed grows in a straight line.
    needed_s = np.concatenate([[0.0], np.cumsum(cost[:-1] * np.diff(at))])
    allowed = needed_s <= MAX_LOAD * at + 1e-9
    return bool(allowed.all() and cost[-1] <= MAX_LOAD)


def wait_s(rows: Sequence[Row], now_s: float, num_ahead: int = 0) -> float:
    """Predicted seconds until a request gets its place, if all places are taken now.

    Args:
        rows: all live requests.
        now_s: the time by the caller's clock.
        num_ahead: requests that wait before it.
    """
    if not rows:
        return 0.0
    ends = sorted(
        (0.0 if row.is_new else max(row.due_s - now_s, 0.0))
        + row.frames_left * (FRAME_S if row.streams else WHOLE_FRAME_S)
        for row in rows
    )
    rounds, place = divmod(num_ahead, len(ends))
    return ends[place] + rounds * sum(ends) / len(ends)


def _weight(streams: bool) -> float:
    return 1.0 if streams else FRAME_S / WHOLE_FRAME_S
