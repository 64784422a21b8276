"""How codes are drawn: one request's parameters, and the rows of tensors that the ops take."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_REPETITION_WINDOW = 2048
"""Frames; no context is longer."""


@dataclass(frozen=True)
class SamplingParams:
    """One request's sampling parameters; `voxkern.ops.sample_tokens` says what each does.

    Attributes:
        temperature: 0 is greedy, at most 100.
        top_k: codes kept, 0 for all.
        top_p: probability mass kept, in (0, 1].
        min_p: share of the most likely code's probability that a code must have, in [0, 1].
        repetition_penalty: on codebook 0 alone, in [0.01, 100]; 1 is none.
        repetition_window: frames back that the penalty looks, 1 to 2048.
        seed: any signed 64-bit integer, or None for a new one each time.

    Raises:
        ValueError: a value is out of its range; the message names the field.
    """

    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 16
    seed: int | None = None

    def __post_init__(self):
        self._require("temperature", 0 <= self.temperature <= 100, "from 0 to 100")
        self._require("top_k", 0 <= self.top_k < 2**31, "0 or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        penalty_fits = 0.01 <= self.repetition_penalty <= 100
        self._require("repetition_penalty", penalty_fits, "from 0.01 to 100")
        window_fits = 1 <= self.repetition_window <= MAX_REPETITION_WINDOW
        self._require("repetition_window", window_fits, f"from 1 to {MAX_REPETITION_WINDOW}")
        seed_fits = self.seed is None or -(2**63) <= self.seed < 2**63
        self._require("seed", seed_fits, "a signed 64-bit integer")

    def _require(self, field: str, fits: bool, expected: str) -> None:
        value = getattr(self, field)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{field} must be {expected}, got {value}")

    def resolved_seed(self) -> int:
        """The seed, or a fresh random one."""
        return secrets.randbits(63) if self.seed is None else self.seed


class SamplingRows(NamedTuple):
    """Sampling parameters of B requests, as the ops take them; see `voxkern.ops.sample_tokens`."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    history: Tensor
    seeds: Tensor
    frames: Tensor

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        frames: Sequence[int],
        histories: Sequence[Sequence[int]],
        device: torch.device,
    ) -> "SamplingRows":
        """Rows for requests whose next frame has index `frames[b]`.

        Args:
            params: one per request.
            seeds: one per request.
            frames: index of the frame to be drawn, within its request.
            histories: codebook-0 codes of all earlier frames; the last `repetition_window` count.
            device: where the ops run.
        """
        window = max((p.repetition_window for p in params), default=1)
        recent = [h[-p.repetition_window :] for p, h in zip(params, histories, strict=True)]
        padded = [[-1] * (window - len(h)) + list(h) for h in recent]

        def floats(field: str) -> Tensor:
            return torch.tensor([getattr(p, field) for p in params], dtype=torch.float32)

        rows = cls(
            temperature=floats("temperature"),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32),
            top_p=floats("top_p"),
            min_p=floats("min_p"),
            repetition_penalty=floats("repetition_penalty"),
            history=torch.tensor(padded, dtype=torch.int64).reshape(len(params), window),
            seeds=torch.tensor(seeds, dtype=torch.int64),
            frames=torch.tensor(frames, dtype=torch.int64),
        )
        return cls(*(t.to(device, non_blocking=True) for t in rows))
