"""The parts of a text that is spoken while it is still being written."""

from collections.abc import Sequence
from typing import overload


class PartFeed(Sequence[str]):
    """The parts that are known so far, at least one.

    One thread appends and closes, another one speaks. Neither needs a lock: the sequence only
    grows, and nothing is appended after `close`.

    Args:
        first: the first part.

    Attributes:
        is_open: more parts may come.
        num_spoken: parts whose speech is made; counted by the thread that speaks.
        spoken_at_s: time at which the last of them was made, by `time.monotonic`.
    """

    def __init__(self, first: str) -> None:
        self._parts = [first]
        self.is_open = True
        self.num_spoken = 0
        self.spoken_at_s = 0.0

    def append(self, part: str) -> None:
        """Add the next part."""
        assert self.is_open
        self._parts.append(part)

    def close(self) -> None:
        """Tell that no further part comes."""
        self.is_open = False

    def count_spoken(self, number: int, now_s: float) -> None:
        """Tell that the speech of so many parts is made."""
        self.spoken_at_s = now_s  # first: the other thread reads it once the feed is starved
        self.num_spoken = number

    @property
    def is_starved(self) -> bool:
        """True if everything is spoken, and more may come."""
        return self.is_open and self.num_spoken >= len(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._parts[index]
