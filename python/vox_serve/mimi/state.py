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
    tensors: list[Tensor]  # keys and values of every layer in turn, [B, Hkv, capacity, D]
    end: int  # steps written, those of the newest window included


class KeyWindow:
    """Keys and values of the last `length` steps, for every layer: a value that is cheap to extend.

    A window is a range of a log with room behind it. Extending the newest window of a log writes
    there, in place, where no other window looks; extending an older one (a stream taken up again
    from an earlier state) copies first. A log never outgrows its window and `LOG_ROOM` steps or
    one chunk.
    """

    def __init__(self, log: _Log, end: int, length: int) -> None:
        self._log, self._end, self.length = log, end, length

    @classmethod
    def of(cls, tensors: list[Tensor], length: int) -> "KeyWindow":
        """A window that holds what `tensors()` returns, each `[B, Hkv, length, D]`."""
        return cls(_Log(tensors, length), length, length)

    def tensors(self) -> list[Tensor]:
        """Keys and values of every layer in turn, `[B, Hkv, length, D]`, the newest last: views."""
        return [x[:, :, self._end - self.length : self._end] for x in self._log.tensors]

    def extended(self, steps: int) -> "KeyWindow":
        """The window after so many more steps, whose keys and values `write` must now provide."""
        log, end = self._log, self._end + steps
        if log.end != self._end or any(end > x.shape[2] for x in log.tensors):
            room = max(steps, LOG_ROOM)
            log, end = _Log([], 0), self.length + steps
            for kept in self.tensors():
                batch, heads, _, dim = kept.shape
                log.tensors.append(kept.new_empty(batch, heads, self.length + room, dim))
                log.tensors[-1][:, :, : self.length] = kept
        log.end = end
        return KeyWindow(log, end, self.length)

    def write(self, which: int, new: Tensor) -> Tensor:
        """Store the newest steps of one tensor.

        Args:
            which: its place in `tensors()`.
            new: `[B, Hkv, steps, D]`.

        Returns:
            `[B, Hkv, length + steps, D]`, all that the newest steps may look at: a view.
        """
        start = self._end - new.shape[2]
        tensor = self._log.tensors[which]
        tensor[:, :, start : self._end] = new
        return tensor[:, :, start - self.length : self._end]


class StreamState(NamedTuple):
    """The state of B streams, of one half of the codec; its size does not grow with time.

    Rows are independent and may be at different positions. A step returns another state; the one
    that it was given stays good.

    Fields:
        positions: `[B]` int64, steps that the transformer has seen.
        window: keys and values, of which only the last `positions[b]` of row b count.
        lefts: left context of every convolution that has one, `[B, context, width]`.
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
            KeyWindow.of([part[index] for part in self.window.tensors()], self.window.length),
            tuple(part[index] for part in self.lefts),
        )

    @staticmethod
    def join(states: Sequence["StreamState"]) -> "StreamState":
        """The streams of one or more states, one after another, as one state."""
        windows = zip(*(state.window.tensors() for state in states), strict=True)
        return StreamState(
            torch.cat([state.positions for state in states]),
            KeyWindow.of([torch.cat(parts) for parts in windows], states[0].window.length),
            tuple(torch.cat(parts) for parts in zip(*(s.lefts for s in states), strict=True)),
        )
