"""The expected length of speech, learnt from speech that has ended."""

import math

START_SPREAD = 0.25
"""Standard deviation of actual over expected length before anything was learnt."""

LEAST_SPREAD = 0.1
"""A speech may always go on."""

START_WEIGHT = 4.0
"""The assumption at the start, or from texts of other lengths, counts as so many speeches."""

MEMORY = 200.0
"""About so many of the newest speeches count."""

MOST_RATIO = 4.0
"""A single speech counts as at most so many times its guess."""


class SpeechLengths:
    """Corrects guesses of lengths, in frames, by what became of earlier ones.

    A model may speak long texts faster, or leave out parts of them. So each octave of guesses has a
    ratio of its own, which starts from that of all. There is no clock and no tensor here.

    Attributes:
        spread: standard deviation of actual over expected length.
    """

    def __init__(self) -> None:
        self._all = _Mean(1.0)
        self._octaves: dict[int, _Mean] = {}
        self._variance = _Mean(START_SPREAD**2)
        self.spread = START_SPREAD

    def expected(self, guess: float) -> float:
        """The expected length of speech.

        Args:
            guess: by its text; infinite if unknown.
        """
        if not math.isfinite(guess):
            return guess
        octave = self._octaves.get(_octave(guess))
        return guess * (octave.with_start(self._all.value) if octave else self._all.value)

    def ended(self, guess: float, frames: int, was_cut: bool = False) -> None:
        """Learn from speech that has ended.

        Args:
            guess: by its text.
            frames: its length.
            was_cut: it would have gone on. So it counts only if it was longer than expected.
        """
        expected = self.expected(guess)
        if not math.isfinite(guess) or guess < 1 or (was_cut and frames < expected):
            return
        ratio = min(frames / guess, MOST_RATIO)
        self._variance.add((ratio * guess / expected - 1) ** 2)
        self._all.add(ratio)
        self._octaves.setdefault(_octave(guess), _Mean(0.0, 0.0)).add(ratio)
        self.spread = max(math.sqrt(self._variance.value), LEAST_SPREAD)


class _Mean:
    """A running mean in which new values count more than old ones."""

    def __init__(self, value: float, weight: float = START_WEIGHT) -> None:
        self.value, self._weight = value, weight

    def add(self, value: float) -> None:
        self._weight = min(self._weight + 1, MEMORY)
        self.value += (value - self.value) / self._weight

    def with_start(self, start: float) -> float:
        """The mean with another one that counts as `START_WEIGHT` values."""
        return (self._weight * self.value + START_WEIGHT * start) / (self._weight + START_WEIGHT)


def _octave(guess: float) -> int:
    return max(int(guess), 1).bit_length()
