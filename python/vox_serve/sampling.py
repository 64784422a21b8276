"""How codes are drawn: one request's parameters, and the rows of tensors that the ops take."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from vox_serve.config import Config, is_optional, setting_of

_SETTINGS = {item.name: setting_of(item) for item in fields(Config)}


@dataclass(frozen=True)
class SamplingParams:
    """One request's sampling parameters; `voxkern.ops.sample_tokens` says what each does.

    Defaults and bounds are `Config`'s.

    Attributes:
        temperature: 0 is greedy.
        top_k: codes kept, 0 for all.
        top_p: probability mass kept.
        min_p: share of the most likely code's probability that a code must have.
        repetition_penalty: on codebook 0 alone; 1 is none.
        repetition_window: frames back that the penalty looks.
        seed: any signed 64-bit integer, or None for a new one each time.

    Raises:
        ValueError: a value is out of its range; the message names the field.
    """

    temperature: float = Config.temperature
    top_k: int = Config.top_k
    top_p: float = Config.top_p
    min_p: float = Config.min_p
    repetition_penalty: float = Config.repetition_penalty
    repetition_window: int = Config.repetition_window
    seed: int | None = Config.seed

    def __post_init__(self):
        for item in fields(self):
            value, about = getattr(self, item.name), _SETTINGS[item.name]
            if value is None and is_optional(item):
                continue
            if not about.admits(value):
                raise ValueError(f"{item.name} must be {about.limits}, got {value}")

    def resolved_seed(self) -> int:
        """The seed, or a fresh random one."""
        return secrets.randbits(63) if self.seed is None else self.seed


class SamplingRows(NamedTuple):
    """Sampling parameters and recent codes of B sequences; see `voxkern.ops.sample_tokens`.

    Rows change in place. A row's history is a ring over the columns below its window.
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
        """So many rows, to be written; greedy until then.

        Their histories have room for any window: where the ops run, no shape ever changes.
        """

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        return cls(
            temperature=full(0, torch.float32),
            top_k=full(0, torch.int32),
            top_p=full(1, torch.float32),
            min_p=full(0, torch.float32),
            repetition_penalty=full(1, torch.float32),
            history=full(-1, torch.int64, _SETTINGS["repetition_window"].high),
            seeds=full(0, torch.int64),
            frames=full(0, torch.int64),
            windows=full(1, torch.int64),
        )

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device
    ) -> "SamplingRows":
        """Rows of sequences without a frame yet, one for each of the parameters and seeds."""
        rows = cls.empty(len(params), device)
        for row, (p, seed) in enumerate(zip(params, seeds, strict=True)):
            rows.write(row, p, seed)
        return rows

    def write(self, row: int, params: SamplingParams, seed: int) -> None:
        """Make a row that of a sequence without a frame yet."""
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            getattr(self, name)[row] = getattr(params, name)
        self.history[row] = -1
        self.seeds[row] = seed
        self.frames[row] = 0
        self.windows[row] = params.repetition_window

    def copy_row(self, source: int, target: int) -> None:
        for tensor in self:
            tensor[target] = tensor[source]

    def first(self, rows: int) -> "SamplingRows":
        """Views of the first rows."""
        return SamplingRows(*(tensor[:rows] for tensor in self))

    def advance(self, code0: Tensor) -> None:
        """Count a frame of every row, whose codebook 0 `[B]` was drawn."""
        self.history.scatter_(1, (self.frames % self.windows)[:, None], code0[:, None])
        self.frames.add_(1)
