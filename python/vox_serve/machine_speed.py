"""The memory of this machine: its size, and its bandwidth."""

import time

import torch

from vox_serve.memory import memory_bytes

_BUFFER_BYTES = 1 << 28  # more than the caches of most processors
_PARTS = 16


def device_memory_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return memory_bytes()


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second at which a device reads memory: the best of a few sums of 16 MiB.

    Other programs only make it slower. A sum of torch's is somewhat slower than the kernels.
    """
    data = torch.ones(_BUFFER_BYTES // 8, dtype=torch.int64, device=device)
    seconds = []
    for part in (*data.chunk(_PARTS), *data.chunk(_PARTS)):
        start = time.perf_counter()
        part.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return _BUFFER_BYTES / _PARTS / min(seconds)
