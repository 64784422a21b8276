"""The roofline of the machine at hand: read bandwidth by working-set size, multiply-add rates.

    python bench/run.py roofline

Every other figure of the bench is given as a fraction of these, measured in the same run.
"""

import ctypes
import statistics
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from report import Report

import voxkern

SOURCE = Path(__file__).with_suffix(".cpp")
MEMORY_BYTES = 1 << 30  # far beyond any last-level cache


@cache
def _probe() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roofline.so"
        flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["c++", *flags, SOURCE, "-o", library], check=True)
        probe = ctypes.CDLL(str(library))
    probe.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    probe.read_memory.restype = ctypes.c_uint64
    for rate in (probe.multiply_float32, probe.multiply_bfloat16):
        rate.argtypes = (ctypes.c_int64, ctypes.c_int)
        rate.restype = ctypes.c_double
    return probe


@cache
def _buffer(size_bytes: int) -> torch.Tensor:
    return torch.ones(size_bytes, dtype=torch.uint8)  # written, so that its pages exist


def read_bandwidth(size_bytes: int = MEMORY_BYTES, threads: int | None = None) -> float:
    """Bytes per second that `threads` read from a buffer of `size_bytes`, once through it."""
    threads = threads or voxkern.num_threads()
    data = _buffer(size_bytes).data_ptr()
    rounds = max(1, (1 << 28) // size_bytes)
    start = time.perf_counter()
    _probe().read_memory(data, size_bytes, threads, rounds)
    return size_bytes * rounds / (time.perf_counter() - start)


def multiply_rate(dtype: torch.dtype, threads: int | None = None) -> float:
    """Floating-point operations per second; bfloat16 counts as float32 where it has no own unit."""
    threads = threads or voxkern.num_threads()
    name = "multiply_bfloat16" if dtype == torch.bfloat16 else "multiply_float32"
    start = time.perf_counter()
    operations = getattr(_probe(), name)(5_000_000, threads)
    if not operations:
        return multiply_rate(torch.float32, threads)
    return operations / (time.perf_counter() - start)


def median_of(measure, times: int = 7, *args) -> float:
    """The median of `times` calls of `measure(*args)`, after one that is not counted."""
    measure(*args)
    return statistics.median(measure(*args) for _ in range(times))


def run(report: Report) -> None:
    threads = voxkern.num_threads()
    table = report.table("roofline", ["what", "one thread", f"{threads} threads", "unit"])
    for mib in (1, 4, 16, 32, 64, 1024):
        rates = [median_of(read_bandwidth, 7, mib << 20, n) / 1e9 for n in (1, threads)]
        table.add(f"read {mib} MiB", *rates, "GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        rates = [median_of(multiply_rate, 5, dtype, n) / 1e9 for n in (1, threads)]
        table.add(f"multiply-add {str(dtype).removeprefix('torch.')}", *rates, "GFLOP/s")
