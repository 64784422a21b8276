"""The pace of a line of streams, and the waits that follow from it: without a clock."""

from collections.abc import Sequence

from vox_serve.admission import wait_s
from vox_serve.deadlines import Row
from vox_serve.step_times import StepTimes

MEMORY = 16.0
"""About so many of the newest intervals count."""

LATEST = 1.5
"""A stream that still waits after so many times the longest predicted wait is refused."""


class LinePace:
    """Predicts waits by the intervals at which earlier streams left the line.

    There is no clock here: the caller gives the time.
    """

    def __init__(self) -> None:
        self._interval_s = 0.0
        self._num_seen = 0.0
        self._last_s: float | None = None

    def admitted(self, now_s: float, num_waiting: int) -> None:
        """A stream got its place, and so many others wait still."""
        if self._last_s is not None:
            self._num_seen = min(self._num_seen + 1, MEMORY)
            self._interval_s += (now_s - self._last_s - self._interval_s) / self._num_seen
        self._last_s = now_s if num_waiting else None

    def wait_s(
        self, rows: Sequence[Row], now_s: float, times: StepTimes, num_ahead: int = 0
    ) -> float:
        """Predicted seconds until a request gets its place.

        Until the line has moved, `admission.wait_s` predicts it, and at least that long is the wait
        of a line that has come to rest.

        Args:
            rows, now_s, times, num_ahead: as there.
        """
        if self._last_s is None or self._num_seen < MEMORY / 4:
            return wait_s(rows, now_s, times, num_ahead)
        since_s = now_s - self._last_s
        return num_ahead * self._interval_s + max(self._interval_s, since_s)
