"""The state of the codec's streams between chunks."""

from typing import NamedTuple

import torch
from torch import Tensor


class StreamState(NamedTuple):
    """The state of B streams in one half of the codec (encoder or decoder), updated in place.

    From step to step only the contents of the tensors change, so a CUDA graph can record a step.
    Rows are independent and may be at different positions.

    Fields:
        positions: `[B]` int64, number of steps that the transformer has run.
        keys: `[B, L, Hkv, capacity, D]`, ring buffers as `mimi_transformer` takes them.
        values: like keys.
        lefts: left context of each convolution, `[B, context, width]`.
    """

    positions: Tensor
    keys: Tensor
    values: Tensor
    lefts: tuple[Tensor, ...]

    @property
    def batch_size(self) -> int:
        return self.positions.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.positions, self.keys, self.values, *self.lefts)

    def view(self, rows: int) -> "StreamState":
        """Views of the first streams; a step on them updates this."""
        return StreamState(
            positions=self.positions[:rows],
            keys=self.keys[:rows],
            values=self.values[:rows],
            lefts=tuple(left[:rows] for left in self.lefts),
        )

    @torch.inference_mode()
    def reset(self, row: int) -> None:
        """Make a row a stream that has not begun. It never attends to older keys in its row."""
        for part in (self.positions, *self.lefts):
            part[row].zero_()
