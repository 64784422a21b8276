"""Roofline of this machine: read bandwidth by working-set size, multiply-add rates.

    python bench/run.py roofline

Working sets are half of L2 per thread, then fractions and multiples of the L3 that all threads
share, then more than any cache holds. Every other benchmark reports its figures as a fraction of
these, measured in the same run. On a GPU: a large copy, and torch's products of large matrices.
"""

import ctypes
import statistics
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from machine import cache_bytes
from report import Report

import voxkern

SOURCE = Path(__file__).with_suffix(".cpp")
MEMORY_BYTES = 1 << 30  # far beyond any last-level cache
RATES = {
    torch.float32: "multiply_float32",
    torch.bfloat16: "multiply_bfloat16",
    torch.int8: "multiply_int8",
}


@cache
def _probe() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roofline.so"
        flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]
        try:
            subprocess.run(["c++", *flags, SOURCE, "-o", library], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"could not compile the bandwidth probe: {error}") from None
        probe = ctypes.CDLL(str(library))
    probe.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    probe.read_memory.restype = ctypes.c_uint64
    for name in RATES.values():
        rate = getattr(probe, name)
        rate.argtypes = (ctypes.c_int64, ctypes.c_int)
        rate.restype = ctypes.c_double
    return probe


@cache
def _buffer(size_bytes: int) -> torch.Tensor:
    return torch.ones(size_bytes, dtype=torch.uint8)  # written, so that its pages exist


def release_buffers() -> None:
    """Free the memory that the reads went through; the next read takes it again."""
    _buffer.cache_clear()


def read_bandwidth(size_bytes: int = MEMORY_BYTES, threads: int | None = None) -> float:
    """Bytes per second at which `threads` read a buffer of `size_bytes`.

    Raises:
        RuntimeError: the probe cannot be compiled, for instance without a C++ compiler.
    """
    threads = threads or voxkern.num_threads()
    data = _buffer(size_bytes).data_ptr()
    rounds = max(1, (1 << 28) // size_bytes)
    start = time.perf_counter()
    _probe().read_memory(data, size_bytes, threads, rounds)
    return size_bytes * rounds / (time.perf_counter() - start)


def multiply_rate(dtype: torch.dtype, threads: int | None = None) -> float:
    """Operations per second, two for each multiply-add.

    Returns the float32 rate for bfloat16 and int8 if the processor has no instruction for them.
    """
    threads = threads or voxkern.num_threads()
    start = time.perf_counter()
    operations = getattr(_probe(), RATES[dtype])(5_000_000, threads)
    if not operations:
        return multiply_rate(torch.float32, threads)
    return operations / (time.perf_counter() - start)


def working_sets(l2_bytes: int, l3_bytes: int, threads: int) -> list[tuple[str, int]]:
    """Names and sizes of the working sets; a cache of unknown size (0) is left out.

    Half a cache certainly stays resident; a whole one shows how much its other users leave.
    """
    sets = [
        ("half of L2 each", l2_bytes // 2 * threads),
        ("half of L3", l3_bytes // 2),
        ("L3", l3_bytes),
        ("twice L3", 2 * l3_bytes),
        ("memory", MEMORY_BYTES),
    ]
    return [(name, size) for name, size in sets if size]


def median_of(measure, times: int = 7, *args) -> float:
    """Median of `times` calls of `measure(*args)`, after one warm-up call."""
    measure(*args)
    return statistics.median(measure(*args) for _ in range(times))


def run_gpu(report: Report, timer) -> None:
    """The bandwidth and rates of `timer`, a `timing.GpuTimer`, which roofline figures refer to."""
    table = report.table("roofline", ["what", "rate", "unit"])
    rates = sorted(timer.bandwidth() / 1e9 for _ in range(7))
    for what, rate in zip(
        ("least", "median", "most"), (rates[0], rates[3], rates[-1]), strict=True
    ):
        table.add(f"copy, {what}", rate, "GB/s")
    for dtype in RATES:
        name = str(dtype).removeprefix("torch.")
        table.add(f"product {name}", timer.rate(dtype) / 1e12, "Top/s")


def run(report: Report) -> None:
    threads = voxkern.num_threads()
    table = report.table("roofline", ["what", "size", "one thread", f"{threads} threads", "unit"])
    sets = [working_sets(cache_bytes(2), cache_bytes(3), n) for n in (1, threads)]
    for (name, one), (_, size) in zip(*sets, strict=True):
        rates = [median_of(read_bandwidth, 7, s, n) / 1e9 for s, n in ((one, 1), (size, threads))]
        table.add(f"read {name}", f"{size / 2**20:g} MiB", *rates, "GB/s")
    for dtype in RATES:
        rates = [median_of(multiply_rate, 5, dtype, n) / 1e9 for n in (1, threads)]
        name = str(dtype).removeprefix("torch.")
        table.add(f"multiply-add {name}", None, *rates, "Gop/s")
