"""The memory and time that a model takes in each precision, before it is loaded."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from vox_serve.csm_weights import PACKINGS, CsmWeights
from vox_serve.frame_bytes import frame_bytes, num_tensor_bytes
from vox_serve.kv_cache import KvCache
from vox_serve.machine_speed import device_memory_bytes, measured_bandwidth
from vox_serve.model_config import CsmConfig

FRAMES_PER_S = 12.5
"""Frames of Mimi in a second of speech."""


@dataclass(frozen=True)
class Machine:
    """The device that a model would run on.

    Attributes:
        device: "cpu" or "cuda".
        memory_bytes: that it has.
        bytes_per_s: at which it reads memory.
        is_measured: whether that was measured; otherwise somebody gave it.
    """

    device: str
    memory_bytes: int
    bytes_per_s: float
    is_measured: bool

    @classmethod
    def here(cls, device: str, bytes_per_s: float | None = None) -> "Machine":
        """This machine; if no bandwidth is given, it is measured within a second."""
        place = torch.device(device)
        measured = bytes_per_s is None
        speed = measured_bandwidth(place) if bytes_per_s is None else bytes_per_s
        return cls(device, device_memory_bytes(place), speed, measured)


@dataclass(frozen=True)
class Cost:
    """A model in one precision.

    Attributes:
        flags: launch's flags for it.
        memory_bytes: of the weights and of one request's keys and values; the codec and other
            parts are small beside them.
        frame_bytes: weights read for a frame.
        frames_per_s: at most; real time is `FRAMES_PER_S`. Reading the weights takes all the time
            of a single request's frame, or nearly.
        fits: whether the machine has the memory.
    """

    flags: str
    memory_bytes: int
    frame_bytes: int
    frames_per_s: float
    fits: bool

    @property
    def is_real_time(self) -> bool:
        return self.fits and self.frames_per_s >= FRAMES_PER_S

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_real_time": self.is_real_time}


def costs(config: CsmConfig, machine: Machine) -> list[Cost]:
    """A model's costs in each precision that fits its sizes."""
    found = []
    for dtype, quantize in (
        (torch.float32, "none"),
        (torch.bfloat16, "none"),
        *((torch.bfloat16, packing) for packing in PACKINGS if packing != "none"),
    ):
        try:
            weights = CsmWeights.empty(config, dtype, "meta", quantize)
        except ValueError:
            continue
        name = str(dtype).removeprefix("torch.")
        flags = f"--dtype {name}" if quantize == "none" else f"--quantize {quantize}"
        needed = num_tensor_bytes(list(weights.named().values()))
        needed += KvCache.sequence_bytes(config.backbone, dtype)
        read = frame_bytes(weights).total
        speed = machine.bytes_per_s / read
        found.append(Cost(flags, needed, read, speed, needed <= machine.memory_bytes))
    return found
