"""The machine a benchmark ran on: processor, caches, memory, GPU, versions."""

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

import voxkern

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe() -> dict:
    """The machine as it is saved with results; sizes in bytes."""
    return {
        "processor": processor(),
        "threads": voxkern.num_threads(),
        "isa": torch.ops.voxkern.cpu_isa(),
        "caches": {f"L{level}": cache_bytes(level) for level in (1, 2, 3)},
        "memory": memory_bytes("MemTotal"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": gpu(),
    }


def gpu() -> dict | None:
    """The current GPU, its present clocks, and its driver and CUDA versions."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "L2": properties.L2_cache_size,
        "CUDA": torch.version.cuda,
        **nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power and temperature from nvidia-smi; empty without it."""
    fields = {
        "driver": "driver_version",
        "SM clock": "clocks.sm",
        "SM clock most": "clocks.max.sm",
        "memory clock": "clocks.mem",
        "power": "power.draw",
        "power limit": "power.limit",
        "temperature": "temperature.gpu",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = result.stdout.splitlines()[0].split(", ") if result.stdout else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def last_cache_bytes(device: str) -> int:
    """Size of the last-level cache that a device's reads pass through; 0 if unknown."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    return cache_bytes(3)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, with family and model: virtual machines shorten the name, and these
    identify the generation."""
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
    """The size of processor 0's data cache of that level; 0 if the system does not report it."""
    for cache_dir in CACHES.glob("index*"):
        if (cache_dir / "level").read_text().strip() != str(level):
            continue
        if (cache_dir / "type").read_text().strip() != "Instruction":
            size = (cache_dir / "size").read_text().strip()
            return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    return 0


def memory_bytes(field: str) -> int | None:
    """MemTotal or MemAvailable (free memory and reclaimable caches); None if not reported."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None
