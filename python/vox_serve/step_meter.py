"""Measures the steps of an engine, from which it learns how long they take."""

from vox_serve.step_times import StepTimes


class StepMeter:
    """Measures the time between the ends of steps that follow each other without a pause.

    So what the caller does between two steps counts, and so does what a GPU does while the host
    handles the frame before.

    Args:
        times: learns from the measurements.
    """

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._since_s: float | None = None
        self._num_tokens = 0  # of steps whose end was not seen

    def begin(self, now_s: float) -> None:
        """A step begins."""
        if self._since_s is None:
            self._since_s = now_s

    def finish(self, now_s: float, num_rows: int, num_tokens: int) -> None:
        """A step's frames are there; it prefilled so many tokens as well."""
        if self._since_s is not None:
            num_tokens += self._num_tokens
            self._times.observe(num_rows, num_tokens, now_s - self._since_s)
        self._since_s, self._num_tokens = now_s, 0

    def prefilled(self, now_s: float, num_tokens: int, is_done: bool) -> None:
        """A step without frames was launched.

        Args:
            now_s: the time.
            num_tokens: prompt tokens of the step; 0 if it did nothing.
            is_done: False if the device may still work on it.
        """
        if not num_tokens:
            self.rest()
        elif is_done:
            self.finish(now_s, 0, num_tokens)
        else:
            self._num_tokens += num_tokens

    def rest(self) -> None:
        """No step follows at once."""
        self._since_s, self._num_tokens = None, 0
