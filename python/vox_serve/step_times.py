"""The seconds that a step of the engine takes, learnt while it runs: no clock, no tensors."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

FIRST_GUESS_S = 0.01
"""Seconds of a step of one row before anything was measured: eight rows take the 80 ms of a frame,
and each measured step corrects it."""

WINDOW = 31
"""Newest measurements that count in each bucket. Their median ignores what happens now and then: a
page fault, a paused machine, a compiled kernel."""

SLOW_WINDOW = 127
QUANTILES = 20
MEMORY_FRAMES = 2000
"""Frames over which the cost of prompts is averaged."""

LATELY = 48
"""About so many of the newest steps tell whether the machine is slower than its medians."""
MOST_RATIO = 3.0
"""A single step counts there as at most so many times its prediction."""

REFRESH_STEPS = 8
"""A median is computed after so many measurements: each of them changes it little."""

STALE_STEPS = 512
"""A size that was not measured in so many steps counts as unknown: the policy tries it again."""

EXACT = 16
"""Counts up to this one have a bucket each; further ones share eight between powers of two."""


class StepTimes:
    """Seconds of a step, by its rows and its prompt tokens.

    A step costs what its rows cost and, on top, what its prompt tokens cost. Both are tables of
    medians with straight lines between them. So they follow a CPU, whose steps grow with each row,
    and a GPU, whose steps take equally long up to the tile of a matrix product. Beyond the largest
    count that was measured, time grows in proportion: too pessimistic, until a step of that size
    has been measured.
    """

    def __init__(self) -> None:
        self._rows = _Curve(FIRST_GUESS_S)
        self._tokens = _Curve(FIRST_GUESS_S / 4)
        self._ratios: deque[float] = deque(maxlen=SLOW_WINDOW)
        self._table = np.zeros(1)
        self._num_steps = 0
        self._prompts_s = self._frames = 0.0
        self._measured_s = self._predicted_s = 0.0
        self.slow = 1.0
        """Measured over predicted seconds, in one of the slowest steps of twenty."""

    @property
    def prompt_s(self) -> float:
        """Seconds of prompts, and of steps made for them, for each frame that was made lately."""
        return self._prompts_s / max(self._frames, MEMORY_FRAMES / 8)

    @property
    def lately(self) -> float:
        """Measured over predicted seconds of the newest steps without prompts, at least 1."""
        if self._num_steps <= LATELY or not self._predicted_s:
            return 1.0
        return max(self._measured_s / self._predicted_s, 1.0)

    def observe(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step.

        Args:
            rows: rows that made a frame, those included whose prompt ended in the step.
            prompt_tokens: tokens of prompts in the step.
            seconds: from its begin to its end.
        """
        if self._num_steps:
            predicted_s = max(self.seconds(rows, prompt_tokens), 1e-9)
            self._ratios.append(seconds / predicted_s)
            if not prompt_tokens and self.knows(rows):
                seen_s = min(seconds, MOST_RATIO * predicted_s)
                self._measured_s += seen_s - self._measured_s / LATELY
                self._predicted_s += predicted_s - self._predicted_s / LATELY
        if self._num_steps % STALE_STEPS == 0 and self._rows.forget(self._num_steps - STALE_STEPS):
            self._table = np.zeros(1)
        if self._num_steps % REFRESH_STEPS == 0 and self._ratios:
            ordered = sorted(self._ratios)
            self.slow = min(max(ordered[int(0.95 * len(ordered))], 1.0), 2.0)
        self._num_steps += 1
        if prompt_tokens:
            self._tokens.observe(prompt_tokens, max(seconds - self.seconds(rows), 0.0))
        elif self._rows.observe(rows, seconds, self._num_steps):
            self._table = np.zeros(1)
        keep = max(1 - rows / MEMORY_FRAMES, 0.0)
        self._prompts_s *= keep
        if prompt_tokens:  # beyond the price of its frames in a large step
            self._prompts_s += max(self.seconds(rows, prompt_tokens) - rows * self._rows.each_s, 0)
        self._frames = keep * self._frames + rows

    def forget_recent(self) -> None:
        """Keep the medians; forget how slow the newest steps were, and the share of prompts."""
        self._ratios.clear()
        self.slow = 1.0
        self._prompts_s = self._frames = self._measured_s = self._predicted_s = 0.0

    def summary(self) -> dict[str, object]:
        """The measurements, for people and `bench/simulate.py`. Any thread may call this.

        Returns:
            "rows" and "prompt_tokens": median ms by their number; and "measured_over_predicted",
            quantiles from the least to the most of the newest steps.
        """
        ratios = sorted(self._ratios.copy())
        last = len(ratios) - 1
        quantiles = [ratios[last * n // QUANTILES] for n in range(QUANTILES + 1)] if ratios else []
        return {
            "rows": self._rows.medians_ms(),
            "prompt_tokens": self._tokens.medians_ms(),
            "measured_over_predicted": [round(ratio, 3) for ratio in quantiles],
        }

    def knows(self, rows: int) -> bool:
        """True if steps of about so many rows were measured lately."""
        return self._num_steps - self._rows.last_step(rows) <= STALE_STEPS

    def seconds(self, rows: int, prompt_tokens: int = 0) -> float:
        """Predicted seconds of a step; 0 for an empty one."""
        return float(self.table(rows)[rows] + self.prompts_s([prompt_tokens])[0])

    def prompts_s(self, tokens: Sequence[int]) -> np.ndarray:
        """Predicted seconds of prompts on top of a step's rows, of each alone: float64."""
        counts = np.array(tokens)
        return np.where(counts > 0, self._tokens.values(counts), 0.0)

    def table(self, most_rows: int) -> np.ndarray:
        """Predicted seconds of steps of 0, 1, ... rows without prompt tokens: float64, read only.

        The table has at least `most_rows + 1` entries.
        """
        if len(self._table) <= most_rows:
            size = 1 << (most_rows + 1).bit_length()
            self._table = self._rows.values(np.arange(size))
            self._table[0] = 0.0
        return self._table

    def tokens_within(self, seconds: float, most: int) -> int:
        """The most prompt tokens, up to `most`, that take no longer than `seconds`."""
        if most <= 0 or seconds <= 0:
            return 0
        fits = np.flatnonzero(self._tokens.values(np.arange(1, most + 1)) <= seconds)
        return int(fits[-1]) + 1 if len(fits) else 0


@dataclass
class _Bucket:
    """Newest measurements of one size."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    num_seen: int = 0
    last_step: int = 0


class _Curve:
    """Medians by bucket, with straight lines between them."""

    def __init__(self, guess_s: float) -> None:
        self._guess_s = guess_s
        self._buckets: dict[int, _Bucket] = {}
        self._medians: dict[int, float] = {}

    def observe(self, count: int, seconds: float, step: int = 0) -> bool:
        """Take a measurement; True if it changed the curve."""
        if count < 1:
            return False
        at = _bucket(count)
        bucket = self._buckets.setdefault(at, _Bucket())
        bucket.seconds.append(seconds)
        bucket.num_seen += 1
        bucket.last_step = step
        if bucket.num_seen > REFRESH_STEPS and bucket.num_seen % REFRESH_STEPS:
            return False
        self._medians[at] = statistics.median(bucket.seconds)
        if bucket.num_seen == 1:
            self._medians = dict(sorted(self._medians.items()))
        return True

    def forget(self, before: int) -> bool:
        """Drop sizes not measured since a step that cost more, for each one, than a smaller size.

        Nobody would choose such a size, and so a single slow measurement would stay for ever.

        Returns:
            True if this changed the curve.
        """
        least_s, dropped = math.inf, []
        for at, median_s in self._medians.items():
            if median_s / at > least_s and self._buckets[at].last_step < before:
                dropped.append(at)
            least_s = min(least_s, median_s / at)
        for at in dropped:
            del self._medians[at], self._buckets[at]
        return bool(dropped)

    def last_step(self, count: int) -> float:
        """The step given with the last measurement of a size; minus infinity without one."""
        bucket = self._buckets.get(_bucket(count))
        return bucket.last_step if bucket else -math.inf

    def medians_ms(self) -> dict[int, float]:
        """Median ms by size."""
        return {at: round(1e3 * seconds, 3) for at, seconds in self._medians.copy().items()}

    @property
    def each_s(self) -> float:
        """The price of one in a large step."""
        at = max(self._medians, default=1)
        return self._medians.get(at, self._guess_s) / at

    def values(self, counts: np.ndarray) -> np.ndarray:
        medians = self._medians or {1: self._guess_s}
        at = list(medians)
        values: np.ndarray = np.interp(counts, at, list(medians.values()))
        return np.maximum(1.0, counts / at[-1]) * values


def _bucket(count: int) -> int:
    """The largest count of the bucket that `count` falls into: a multiple of its width.

    A GPU's tiles end at such multiples too.
    """
    if count <= EXACT:
        return count
    width = 1 << ((count - 1).bit_length() - 4)
    return -(-count // width) * width
