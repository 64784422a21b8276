"""What a stream of the codec remembers between chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Steps that fit behind a full window before it is copied to the front of a new log.
LOG_ROOM = 64


@dataclass
class _Log:
    tensor: Tensor  # keys, values: [2, L, B, Hkv, capacity, D]
    end: int  # steps written, those of the newest window included


class KeyWindow:
    """Keys and values of the last `length` steps, for every layer: a value that is cheap to extend.

    A window is a range of a log with room behind it. Extending the newest window of a log writes
    there, in place, where no other window looks; extending an older one (a stream taken up again
    from an earlier state) copies first. A log never outgrows its window and `LOG_ROOM` steps or
    one chunk.
    """

    def __init__(self, log: _Log, end: int, length: int) -> None:
        self._log, self.end, self.length = log, end, length

    @classmethod
    def of(cls, tensor: Tensor) -> "KeyWindow":
        """A window that holds what `tensor()` returns, `[2, L, B, Hkv, length, D]`."""
        length = tensor.shape[4]
        return cls(_Log(tensor, length), length, length)

    @property
    def log(self) -> Tensor:
        """`[2, L, B, Hkv, capacity, D]`, keys and values; the window ends at slot `end`."""
        return self._log.tensor

    def tensor(self) -> Tensor:
        """Keys and values, `[2, L, B, Hkv, length, D]`, the newest last: a view."""
        return self.log[..., self.end - self.length : self.end, :]

    def extended(self, steps: int) -> "KeyWindow":
        """The window after so many more steps, which are to be written to the end of its log."""
        log, end = self._log, self.end + steps
        if log.end != self.end or end > self.log.shape[4]:
            kept, end = self.tensor(), self.length + steps
            capacity = self.length + max(steps, LOG_ROOM)
            log = _Log(kept.new_empty(*kept.shape[:4], capacity, kept.shape[5]), 0)
            log.tensor[..., : self.length, :] = kept
        log.end = end
        return KeyWindow(log, end, self.length)


class StreamState(NamedTuple):
    """The state of B streams, of one half of the codec; its size does not grow with time.

    Rows are independent and may be at different positions. A step returns another state; the one
    that it was given stays good.

    Fields:
        positions: `[B]` int64, steps that the transformer has seen.
        window: keys and values, of which only the last `positions[b]` of row b count.
        lefts: left context of every convolution, `[B, context, width]`.
    """

    positions: Tensor
    window: KeyWindow
    lefts: tuple[Tensor, ...]

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    def rows(self, index: Sequence[int] | Tensor) -> "StreamState":
        """The streams of the given rows, in that order, as a copy of their own."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.positions.device)
        return StreamState(
            self.positions[index],
            KeyWindow.of(self.window.tensor()[:, :, index]),
            tuple(part[index] for part in self.lefts),
        )

    @staticmethod
    def join(states: Sequence["StreamState"]) -> "StreamState":
        """The streams of one or more states, one after another, as one state."""
        return StreamState(
            torch.cat([state.positions for state in states]),
            KeyWindow.of(torch.cat([state.window.tensor() for state in states], 2)),
            tuple(torch.cat(parts) for parts in zip(*(s.lefts for s in states), strict=True)),
        )
