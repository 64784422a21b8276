"""Sampling parameters as rows of tensors, one row per sequence, as the ops take them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vox_serve.config import SamplingParams
from vox_serve.setting import bound

MAX_WINDOW_FRAMES = bound(SamplingParams.model_fields["repetition_window"], "le")


class SamplingRows(NamedTuple):
    """Sampling parameters and recent codes of B sequences; see `voxkern.ops.sample_tokens`.

    Rows are updated in place. A row's history is a ring buffer in its first `windows` columns.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    history: Tensor
    seeds: Tensor
    frames: Tensor
    windows: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "SamplingRows":
        """Allocate rows for `write` to fill; greedy until then.

        The histories have room for the largest window, so that the ops see constant shapes.
        """

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        return cls(
            temperature=full(0, torch.float32),
            top_k=full(0, torch.int32),
            top_p=full(1, torch.float32),
            min_p=full(0, torch.float32),
            repetition_penalty=full(1, torch.float32),
            history=full(-1, torch.int64, MAX_WINDOW_FRAMES),
            seeds=full(0, torch.int64),
            frames=full(0, torch.int64),
            windows=full(1, torch.int64),
        )

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device
    ) -> "SamplingRows":
        """Rows of new sequences, one for each pair of parameters and seed."""
        rows = cls.empty(len(params), device)
        for row, (p, seed) in enumerate(zip(params, seeds, strict=True)):
            rows.write(row, p, seed)
        return rows

    def write(self, row: int, params: SamplingParams, seed: int) -> None:
        """Reset a row to a new sequence's parameters, without history."""
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            getattr(self, name)[row] = getattr(params, name)
        self.history[row] = -1
        self.seeds[row] = seed
        self.frames[row] = 0
        self.windows[row] = params.repetition_window

    def view(self, rows: int) -> "SamplingRows":
        """Views of the first rows."""
        return SamplingRows(*(tensor[:rows] for tensor in self))

    def advance(self, code0: Tensor) -> None:
        """Count a frame in every row and add its codebook 0, `[B]`, to the history."""
        self.history.scatter_(1, (self.frames % self.windows)[:, None], code0[:, None])
        self.frames.add_(1)
