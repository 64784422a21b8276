"""What a benchmark ran on: processor, caches, memory, versions."""

import platform
from functools import cache
from pathlib import Path

import torch

import voxkern

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe() -> dict:
    """The machine in the words that results are saved with; sizes in bytes."""
    return {
        "processor": processor(),
        "threads": voxkern.num_threads(),
        "isa": torch.ops.voxkern.cpu_isa(),
        "caches": {f"L{level}": cache_bytes(level) for level in (1, 2, 3)},
        "memory": memory_bytes("MemTotal"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name. Virtual machines shorten it: family and model tell its generation."""
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    fields = {}
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    if not {"cpu family", "model"} <= fields.keys():
        return fields["model name"]
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


@cache
def cache_bytes(level: int) -> int:
    """The size of processor 0's data cache of a level, 0 if the system does not tell."""
    for cache_dir in CACHES.glob("index*"):
        if (cache_dir / "level").read_text().strip() != str(level):
            continue
        if (cache_dir / "type").read_text().strip() != "Instruction":
            size = (cache_dir / "size").read_text().strip()
            return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    return 0


def memory_bytes(field: str) -> int | None:
    """MemTotal, or MemAvailable: free, or would be if files were not cached. None if not told."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None
