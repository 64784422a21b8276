"""Which requests a step of the engine serves: functions over a plain state, without a clock.

The engine calls them with its live requests; `bench/simulate.py` calls them too. A listener plays a
frame every 80 ms from the first one on, so each frame of a stream has a time at which it is due.
The rules, in this order:

1. Rows whose listener would run dry before the end of the step after this one are in the step.
2. Newcomers, whose listeners hear nothing yet, come next. Other rows wait meanwhile: their
   listeners have audio in hand. Prompts are cut to what fits before the next frame is due, but a
   long one is prefilled at once if no frame is due before its end.
3. Otherwise the rows that are due first are in the step, as few as keep all listeners supplied: a
   newcomer waits for the step in progress. A size that was not measured lately is tried.
4. Whole answers have no listener. They take the place of streams that are ahead of their
   listeners, and none waits longer than `WHOLE_WAIT_S` and one step for each that waited longer.
"""

from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from vox_serve.deadlines import FRAME_S, Row
from vox_serve.due_rows import RESERVE_S, WHOLE_WAIT_S, DueRows
from vox_serve.step_times import StepTimes

__all__ = ["FRAME_S", "Row", "Step", "choose_step"]

PACE = 1.15
"""Frames are made so much faster than all listeners together play them, if the device can."""

EFFICIENT = 0.95
"""Steps are as small as still makes this share of the most frames a second that a device can make:
a newcomer waits for the step in progress."""

BEST = 0.97
"""If the listeners need this share or more, every step should be full."""

MOST = 0.75
"""A step of this share of the rows or more has all of them: rows that come and go are moved, and
steps that are hardly shorter help no newcomer."""

LONG_STEP_S = 0.04
"""Steps grow up to this length for whole answers and their prompts."""

STARVED_S = 0.25
"""A stream's prompt that waited so long gets `FEW_TOKENS` in the next step, whatever is due."""
FEW_TOKENS = 16

WHOLE_TOKENS = 512
"""Most tokens of the first prompt of a step that makes no frame late."""

URGENT_S = 0.5
"""A newcomer whose client speaks nothing else goes before others that came so much earlier."""


class Step(NamedTuple):
    """The work of a step. A row whose prompt ends in the step makes a frame in it as well.

    Attributes:
        frames: rows with a complete prompt that make a frame, in order.
        prompts: rows and the number of tokens of each that are prefilled, in order. A newcomer
            whose prompt is complete already has 0 tokens.
    """

    frames: list[Row]
    prompts: list[tuple[Row, int]]


def choose_step(rows: Iterable[Row], now_s: float, times: StepTimes, chunk_tokens: int) -> Step:
    """Choose the work of the next step; none only if there are no rows.

    Args:
        rows: all live requests.
        now_s: the time by the caller's clock.
        times: how long steps take.
        chunk_tokens: most prompt tokens of a step, but see `WHOLE_TOKENS`.
    """
    rows = list(rows)
    if len(rows) == 1 and not rows[0].num_missing and not rows[0].is_new:
        return Step(rows, [])
    frames = [r for r in rows if not r.num_missing and (r.num_frames or not r.streams)]
    others = [r for r in rows if r.num_missing or (r.streams and not r.num_frames)]
    newcomers = [row for row in others if row.streams and not row.num_frames]
    prompts = [row for row in others if row.num_frames or not row.streams]
    rates_hz = [1 / row.frame_s for row in rows if row.streams]
    num_whole = len(rows) - len(rates_hz)
    ready = DueRows(frames, now_s, times, bool(num_whole))
    hurried = [row for row in prompts if _presses(row, now_s, times, len(frames))]
    if newcomers:
        hurried += _next_newcomers(newcomers, times)
    count, is_tight = _num_paced(len(frames), sum(rates_hz), times)
    if hurried:
        riders = count if is_tight else 0
        if step := _hurried_step(ready, hurried, riders, now_s, times, chunk_tokens):
            return step
    if num_whole:
        count = max(count, ready.fit(LONG_STEP_S))
    count = ready.least_late(max(ready.num_due(), count))
    work: list[tuple[Row, int]] = []
    if prompts:
        prompts.sort(key=attrgetter("due_s"))
        spare_s = min(ready.limit_s(count) / times.slow, LONG_STEP_S) - times.seconds(count)
        fit = times.tokens_within(spare_s, chunk_tokens)
        if not count or any(row.streams and now_s - row.moved_s > STARVED_S for row in prompts):
            fit = max(fit, min(FEW_TOKENS, chunk_tokens))
        work = _cut(prompts, fit)
    return Step(ready.first(count), work)


def _hurried_step(
    ready: DueRows,
    hurried: list[Row],
    riders: int,
    now_s: float,
    times: StepTimes,
    chunk_tokens: int,
) -> Step | None:
    """A step of these prompts and the rows that are due; None if nothing fits beside the latter.

    Where every step should be full, `riders` is the rows of such a step. They come with a first
    frame, since a step of their own would cost more, and no prompt comes before them that leaves no
    time for one step of them all: rows that are due at many different times make many small steps.
    """
    starves = any(now_s - row.moved_s > STARVED_S for row in hurried)
    work = _cut(hurried, chunk_tokens)
    if hurried[0].num_missing > chunk_tokens:
        whole = _cut(hurried[:1], max(chunk_tokens, WHOLE_TOKENS))
        if not ready.num_due(1, _sizes(whole)[0]):
            work = whole
    tokens, ends = _sizes(work)
    if riders and not starves:
        both_s = times.seconds(ends, tokens) + times.seconds(riders)
        if times.slow * both_s > ready.limit_s(riders):
            return None
    count = ready.num_due(ends, tokens)
    rows_s = times.seconds(count + ends)
    limit_s = ready.limit_s(count) / times.slow
    if times.seconds(count + ends, tokens) > limit_s:
        fit = times.tokens_within(limit_s - rows_s, chunk_tokens)
        if fit < FEW_TOKENS:
            if count and not starves:
                return None
            fit = min(FEW_TOKENS, chunk_tokens)
        work = _cut(hurried, fit)
        ends = _sizes(work)[1]
    rides = ready.fit(times.seconds(count + ends), ends)  # they cost nothing
    if riders and ends:
        limit_s = ready.limit_s(riders) / times.slow
        rides = max(rides, min(riders, ready.fit(limit_s - times.seconds(0, tokens), ends)))
    return Step(ready.first(max(count, rides)), work)


def _next_newcomers(rows: list[Row], times: StepTimes) -> list[Row]:
    """The newcomers to serve together, so that all wait least on average.

    Those with the shortest prompts come first; a second of waiting outweighs a second of prefill.
    """
    sizes = np.arange(1, len(rows) + 1)
    waits_s = times.table(len(rows))[1 : len(rows) + 1] * (len(rows) / sizes + 1)
    prefill_s = times.prompts_s([row.num_missing for row in rows])
    came_s = np.array([row.moved_s - URGENT_S * row.urgent for row in rows])
    order = np.argsort(prefill_s + came_s, kind="stable")
    return [rows[index] for index in order[: np.argmin(waits_s) + 1].tolist()]


def _presses(row: Row, now_s: float, times: StepTimes, num_ready: int) -> bool:
    """True if a prompt that is no newcomer's cannot wait for a step without newcomers."""
    if not row.streams:
        return now_s - row.moved_s > WHOLE_WAIT_S
    needed_s = times.seconds(1, row.num_missing) + times.seconds(num_ready)
    return row.due_s - now_s < 2 * times.slow * needed_s + RESERVE_S


def _cut(rows: list[Row], tokens: int) -> list[tuple[Row, int]]:
    """The tokens of each prompt, at most `tokens` together. A complete prompt needs none."""
    work: list[tuple[Row, int]] = []
    for row in rows:
        if row.num_missing and not tokens:
            break
        work.append((row, min(row.num_missing, tokens)))
        tokens -= work[-1][1]
    return work


def _sizes(work: list[tuple[Row, int]]) -> tuple[int, int]:
    """The prompt tokens of a step, and the rows whose prompt ends in it."""
    return sum(n for _, n in work), sum(n == row.num_missing for row, n in work)


def _num_paced(num_ready: int, needed_hz: float, times: StepTimes) -> tuple[int, bool]:
    """The fewest rows in a step with which frames are made fast enough.

    All rows if the time of such a step is not known: it may be the better one.

    Returns:
        The rows; and True if the device is loaded so much that every step should be full.
    """
    if not num_ready:
        return 0, False
    sizes = np.arange(1, num_ready + 1)
    rate_hz = sizes / (times.table(num_ready)[1 : num_ready + 1] + sizes * times.prompt_s)
    best_hz = rate_hz.max()
    wanted_hz = max(EFFICIENT * best_hz, PACE * needed_hz)
    is_tight = bool(wanted_hz >= BEST * best_hz)
    if not times.knows(num_ready):
        return num_ready, is_tight
    if is_tight:
        return int(np.flatnonzero(rate_hz >= BEST * best_hz)[-1]) + 1, True
    count = int(np.flatnonzero(rate_hz >= wanted_hz)[0]) + 1
    return num_ready if count >= MOST * num_ready else count, False
