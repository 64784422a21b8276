"""Which requests a step of the engine serves: functions over a plain state, without a clock.

The engine calls them with its live requests; `bench/simulate.py` calls them too. A listener plays a
frame every 80 ms from the first one on, so each frame of a stream has a time at which it is due.
The rules, in this order:

1. Rows whose listener would run dry before the end of the step after this one are in the step.
2. Newcomers, whose listeners hear nothing yet, come next. Other rows wait meanwhile: their
   listeners have audio in hand.
3. Otherwise the rows that are due first are in the step, as few as keep all listeners supplied: a
   newcomer waits for the step in progress.
4. Whole answers have no listener. They take the place of streams that are ahead of their
   listeners, and none waits longer than `WHOLE_WAIT_S` and one step for each that waited longer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from vox_serve.step_times import StepTimes

FRAME_S = 0.08

WHOLE_FRAME_S = 0.4
"""A frame of a whole answer is due so long after the one before it. Admission counts it so."""

WHOLE_RANK_S = 0.2
"""A whole answer never comes before a stream whose listener has less audio in hand."""

WHOLE_WAIT_S = 1.0
"""A whole answer that waited so long for a step is in the next one."""

STARVED_S = 0.25
"""A prompt that waited so long gets `FEW_TOKENS` in the next step, whatever is due."""
FEW_TOKENS = 16

PACE = 1.25
"""Frames are made this much faster than all listeners together play them, if the device can."""

LONG_STEP_S = 0.04
"""Steps grow up to this length for whole answers, and beyond it only for what is due."""

URGENT_S = 0.5
"""A newcomer whose client speaks nothing else goes before others that came so much earlier."""


@dataclass(slots=True, eq=False)
class Row:
    """A live request. Times are seconds of the caller's clock.

    Attributes:
        id: the request's.
        moved_s: when the request came, or last got a frame or a part of its prompt.
        streams: somebody listens while it is spoken.
        urgent: its client speaks nothing else.
        num_missing: positions of its prompt that are not in the cache.
        num_frames: frames made.
        frames_left: expected further frames; infinite if unknown.
        due_s: when its next frame is due. A stream has none before its first frame.
    """

    id: str
    moved_s: float
    streams: bool = True
    urgent: bool = True
    num_missing: int = 0
    num_frames: int = 0
    frames_left: float = inf
    due_s: float = inf

    def __post_init__(self) -> None:
        if not self.streams and self.due_s == inf:
            self.due_s = self.moved_s + WHOLE_FRAME_S

    @property
    def is_new(self) -> bool:
        """True if somebody waits for its first frame."""
        return self.streams and not self.num_frames

    def prefilled(self, num_tokens: int, now_s: float) -> None:
        """Count prompt tokens that are in the cache now."""
        self.num_missing -= num_tokens
        self.moved_s = now_s

    def made_frame(self, now_s: float) -> None:
        """Count a frame that goes to the listener now."""
        self.num_frames += 1
        self.frames_left = max(self.frames_left - 1, 1)
        self.moved_s = now_s
        if not self.streams:
            self.due_s = now_s + WHOLE_FRAME_S
        elif self.num_frames == 1 or self.due_s < now_s:  # playback begins, or begins again
            self.due_s = now_s + FRAME_S
        else:
            self.due_s += FRAME_S


class Step(NamedTuple):
    """The work of a step. A row whose prompt ends in the step makes a frame in it as well.

    Attributes:
        frames: rows with a complete prompt that make a frame, in order.
        prompts: rows and the number of tokens of each that are prefilled, in order.
    """

    frames: list[Row]
    prompts: list[tuple[Row, int]]


def choose_step(rows: Iterable[Row], now_s: float, times: StepTimes, chunk_tokens: int) -> Step:
    """Choose what the next step does; empty only if there are no rows.

    Args:
        rows: all live requests.
        now_s: the time by the caller's clock.
        times: how long steps take.
        chunk_tokens: most prompt tokens of a step.
    """
    newcomers, prompts, ready = [], [], []
    num_streams = num_whole = 0
    for row in rows:
        if row.streams:
            num_streams += 1
        else:
            num_whole += 1
        if row.streams and not row.num_frames:
            newcomers.append(row)
        elif row.num_missing:
            prompts.append(row)
        else:
            ready.append(row)
    ready.sort(key=_rank(now_s) if num_whole else attrgetter("due_s"))
    newcomers.sort(key=lambda row: _newcomer_rank(row, now_s, times))
    prompts.sort(key=attrgetter("due_s"))

    table = times.table(len(ready) + len(newcomers))
    slack_s = np.fromiter((row.due_s for row in ready), float, len(ready)) - now_s
    if num_whole:
        whole = np.fromiter((not row.streams for row in ready), bool, len(ready))
        slack_s[whole] = np.maximum(slack_s[whole], WHOLE_RANK_S)
    pressing = [row for row in prompts if _presses(row, now_s, times, len(ready))]
    hurried = pressing + newcomers[: _group(len(newcomers), table)]
    due = _num_due(slack_s, table, times, 0, 0)
    if hurried:
        work = _cut(hurried, chunk_tokens)
        tokens, ends = _sizes(work)
        due = _num_due(slack_s, table, times, ends, tokens)
        limit_s = _limit_s(slack_s, table, due)
        if times.seconds(due + ends, tokens) * times.slow > limit_s:
            spare_s = limit_s / times.slow - table[due + ends]
            fit = times.tokens_within(spare_s, chunk_tokens)
            if fit < FEW_TOKENS and any(now_s - row.moved_s > STARVED_S for row in hurried):
                fit = FEW_TOKENS
            work = _cut(hurried, fit) if fit >= FEW_TOKENS or not due else []
        if work:
            rows_in = due + _sizes(work)[1]
            while due < len(ready) and table[rows_in + 1] <= table[rows_in]:  # costs nothing
                due, rows_in = due + 1, rows_in + 1
            return Step(_with_overdue(ready, due, now_s), work)
    count = _num_paced(num_streams, table, len(ready))
    if num_whole:
        count = max(count, int(np.searchsorted(table[: len(ready) + 1], LONG_STEP_S, "right")) - 1)
    count = max(due, min(count, len(ready)))
    limit_s = _limit_s(slack_s, table, count)
    fit = int(np.searchsorted(table[: len(ready) + 1], limit_s / times.slow, "right")) - 1
    count = min(count, max(fit, 1))
    work = []
    if prompts or newcomers:
        spare_s = min(limit_s / times.slow - table[count], max(LONG_STEP_S - table[count], 0))
        tokens = times.tokens_within(spare_s, chunk_tokens)
        waits = any(now_s - row.moved_s > STARVED_S for row in prompts)
        work = _cut(prompts, max(tokens, FEW_TOKENS if waits or not count else 0))
    return Step(_with_overdue(ready, count, now_s), work)


def _rank(now_s: float) -> Callable[[Row], float]:
    earliest_s = now_s + WHOLE_RANK_S
    return lambda row: row.due_s if row.streams else max(row.due_s, earliest_s)


def _newcomer_rank(row: Row, now_s: float, times: StepTimes) -> float:
    """Shortest prompt first, and a second of waiting outweighs a second of prefill."""
    waited_s = now_s - row.moved_s + (URGENT_S if row.urgent else 0.0)
    return times.seconds(0, row.num_missing) - waited_s


def _presses(row: Row, now_s: float, times: StepTimes, num_ready: int) -> bool:
    """True if a prompt that is no newcomer's cannot wait for a step without newcomers."""
    if not row.streams:
        return now_s - row.moved_s > WHOLE_WAIT_S
    needed_s = times.seconds(1, row.num_missing) + times.seconds(num_ready)
    return row.due_s - now_s < 2 * times.slow * needed_s


def _group(num_newcomers: int, table: np.ndarray) -> int:
    """Newcomers to serve together, so that they wait least on average."""
    if not num_newcomers:
        return 0
    sizes = np.arange(1, num_newcomers + 1)
    return int(np.argmin(table[1 : num_newcomers + 1] * (num_newcomers / sizes + 1))) + 1


def _cut(rows: list[Row], tokens: int) -> list[tuple[Row, int]]:
    """The tokens of each prompt, at most `tokens` together. A complete prompt needs none."""
    work = []
    for row in rows:
        if row.num_missing and not tokens:
            break
        work.append((row, min(row.num_missing, tokens)))
        tokens -= work[-1][1]
    return work


def _sizes(work: list[tuple[Row, int]]) -> tuple[int, int]:
    """The prompt tokens of a step, and the rows whose prompt ends in it."""
    return sum(n for _, n in work), sum(n == row.num_missing for row, n in work)


def _num_due(
    slack_s: np.ndarray, table: np.ndarray, times: StepTimes, more_rows: int, tokens: int
) -> int:
    """The rows that cannot wait for the step after one with so many other rows and tokens.

    Rows that wait are served by then in one step more, which costs at least one of one row.
    """
    if not len(slack_s):
        return 0
    extra_s = times.seconds(1, tokens) if tokens else table[1]
    step_s = table[1 + more_rows : len(slack_s) + 1 + more_rows]
    late = np.flatnonzero(slack_s < times.slow * (step_s + extra_s))
    return int(late[-1]) + 1 if len(late) else 0


def _limit_s(slack_s: np.ndarray, table: np.ndarray, count: int) -> float:
    """The time that the first of `count` rows has which is not late in any case."""
    in_time = np.flatnonzero(slack_s[:count] >= table[1 : count + 1])
    return float(slack_s[in_time[0]]) if len(in_time) else inf


def _num_paced(num_streams: int, table: np.ndarray, num_ready: int) -> int:
    """The fewest rows in a step with which all listeners are supplied, and a little faster."""
    if not num_ready:
        return 0
    rate_hz = np.arange(1, num_ready + 1) / table[1 : num_ready + 1]
    enough = np.flatnonzero(rate_hz >= PACE * num_streams / FRAME_S)
    return int(enough[0] if len(enough) else np.argmax(rate_hz)) + 1


def _with_overdue(ready: list[Row], count: int, now_s: float) -> list[Row]:
    """The first `count` rows, and the whole answer that waited longest if it waited too long."""
    overdue = [r for r in ready[count:] if not r.streams and now_s - r.moved_s > WHOLE_WAIT_S]
    return ready[:count] + ([min(overdue, key=attrgetter("moved_s"))] if overdue else [])
