"""Rows that can make a frame, in the order in which they are due."""

from operator import attrgetter

import numpy as np

from vox_serve.deadlines import Row
from vox_serve.step_times import StepTimes

RESERVE_S = 0.03
RISK = 0.2
"""A frame should be ready `RESERVE_S` before it is due. One with less time counts as `RISK` of a
late frame, since the step may take longer than predicted."""

WHOLE_RANK_S = 0.2
"""A whole answer never comes before a stream whose listener has less audio in hand."""

WHOLE_WAIT_S = 1.0
"""A whole answer that waited so long for a step is in the next one."""


class DueRows:
    """Rows that can make a frame, in the order in which they are due, and their slack."""

    def __init__(self, rows: list[Row], now_s: float, times: StepTimes, has_whole: bool) -> None:
        slack_s = np.fromiter([row.due_s for row in rows], float, len(rows)) - now_s
        overdue: list[Row] = []
        if has_whole:
            streams = np.fromiter([row.streams for row in rows], bool, len(rows))
            slack_s = np.where(streams, slack_s, np.maximum(slack_s, WHOLE_RANK_S))
            overdue = [r for r in rows if not r.streams and now_s - r.moved_s > WHOLE_WAIT_S]
        self._order = np.argsort(slack_s, kind="stable")
        self._slack_s = slack_s[self._order]
        self._rows = rows
        self._times = times
        self._overdue = min(overdue, key=attrgetter("moved_s"), default=None)

    def num_due(self, more_rows: int = 0, tokens: int = 0) -> int:
        """The rows that cannot wait for the step after one with so many other rows and tokens.

        Rows that wait are served by then in one step more, which costs at least one of one row.
        """
        n = len(self._rows)
        step_s = self._times.table(n + more_rows)[1 + more_rows : n + more_rows + 1]
        needed_s = self._times.slow * (step_s + self._times.seconds(1, tokens)) + RESERVE_S
        late = np.flatnonzero(self._slack_s < needed_s)
        return int(late[-1]) + 1 if len(late) else 0

    def limit_s(self, count: int) -> float:
        """The time until the first of `count` rows is due, but for those that are late anyway."""
        step_s = self._times.table(count)[1 : count + 1]
        in_time = np.flatnonzero(self._slack_s[:count] >= step_s)
        if not len(in_time):
            return np.inf
        return max(float(self._slack_s[in_time[0]]) - RESERVE_S, 0.0)

    def least_late(self, most: int) -> int:
        """The size of a step, at most `most`, that makes the fewest frames late; the largest such.

        The rows of a small step are in time, but those that wait for many small steps are late.
        """
        fit = self.fit(self.limit_s(most) / self._times.slow)
        if fit >= most:
            return most
        step_s = self._times.slow * self._times.table(most)
        slack_s = self._slack_s[:most]
        fewest, best = np.inf, most
        for count in sorted({most, max(fit, 1), *(most * eighth // 8 for eighth in range(1, 8))}):
            spare_s = slack_s - step_s[count]
            spare_s[count:] -= step_s[1 : most - count + 1]
            late = np.count_nonzero(spare_s < 0) + RISK * np.count_nonzero(spare_s < RESERVE_S)
            if count and late <= fewest:
                fewest, best = late, count
        return best

    def fit(self, seconds: float, more_rows: int = 0) -> int:
        """The rows of which a step, with so many other rows, takes at most so long."""
        most = len(self._rows) + more_rows
        fits = np.flatnonzero(self._times.table(most)[more_rows : most + 1] <= seconds)
        return int(fits[-1]) if len(fits) else 0

    def first(self, count: int) -> list[Row]:
        """The first rows, and the whole answer that waited longest if it waited too long."""
        chosen = [self._rows[index] for index in self._order[:count].tolist()]
        if self._overdue and self._overdue not in chosen:
            chosen.append(self._overdue)
        return chosen
