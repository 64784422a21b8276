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
