"""What a stream of the codec remembers between chunks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StreamState(NamedTuple):
    """The state of B streams, of one half of the codec; its size does not grow with time.

    Rows are independent and may be at different positions. Steps never change the state that they
    are given: they return another one.

    Fields:
        positions: `[B]` int64, steps that the transformer has seen.
        caches: keys and values of every transformer layer in turn, `[B, Hkv, window - 1, D]`.
        lefts: left context of every convolution that has one, `[B, context, width]`.
    """

    positions: Tensor
    caches: tuple[Tensor, ...]
    lefts: tuple[Tensor, ...]

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    def rows(self, index: Sequence[int] | Tensor) -> "StreamState":
        """The streams of the given rows, in that order, as a copy of their own."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.positions.device)
        return self._each(lambda part: part.index_select(0, index))

    @staticmethod
    def join(states: Sequence["StreamState"]) -> "StreamState":
        """The streams of several states, one after another, as one state."""
        return StreamState(
            torch.cat([state.positions for state in states]),
            tuple(map(torch.cat, zip(*(state.caches for state in states), strict=True))),
            tuple(map(torch.cat, zip(*(state.lefts for state in states), strict=True))),
        )

    def _each(self, change) -> "StreamState":
        return StreamState(
            change(self.positions),
            tuple(map(change, self.caches)),
            tuple(map(change, self.lefts)),
        )
