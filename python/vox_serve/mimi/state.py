"""What a stream of the codec remembers between chunks."""

from typing import NamedTuple

import torch
from torch import Tensor


class StreamState(NamedTuple):
    """The state of B streams, of one half of the codec: rows of tensors, updated in place.

    From step to step nothing changes but what the tensors hold, so a CUDA graph can hold a step.
    Rows are independent and may be at different positions.

    Fields:
        positions: `[B]` int64, steps that the transformer has seen.
        keys: `[B, L, Hkv, capacity, D]`, rings as `mimi_transformer` takes them.
        values: like keys.
        lefts: left context of every convolution, `[B, context, width]`.
    """

    positions: Tensor
    keys: Tensor
    values: Tensor
    lefts: tuple[Tensor, ...]

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    def first(self, count: int) -> "StreamState":
        """The streams of the first `count` rows, as views: a step of them updates this state."""
        return StreamState(
            *(part[:count] for part in self[:3]), tuple(left[:count] for left in self.lefts)
        )

    @torch.inference_mode()
    def reset(self, row: int) -> None:
        """Make a row a stream that has not begun. Keys of before it are not seen."""
        for part in (self.positions, *self.lefts):
            part[row].zero_()

    @torch.inference_mode()
    def copy_row(self, source: int, target: int) -> None:
        """Make one row what another is."""
        for part in (*self[:3], *self.lefts):
            part[target].copy_(part[source])
