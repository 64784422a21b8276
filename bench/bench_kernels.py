"""Every op at CSM-1B's shapes: time, bytes or operations per second, share of the roofline.

Inputs rotate through several times the last-level cache where an op's own are large enough: in 64
sets at most, so that what is tiny stays in a cache, as it does within a frame.
"""

import statistics

import torch
from kernel_cases import Case, cases
from report import Report
from timing import CpuTimer, GpuTimer

from vox_serve.model_config import CsmConfig

MOST_SETS = 64


def measure(case: Case, timer: CpuTimer | GpuTimer) -> tuple[float, float | None, float]:
    """Median milliseconds of ours and of torch, None without one, and bytes per second, all timed
    in turn."""
    sets = max(1, min(MOST_SETS, int(timer.rotate_bytes // case.num_bytes)))
    with torch.device(timer.device):
        inputs = [case.inputs() for _ in range(sets)]
    timed = [timer.prepare(f, inputs) for f in (case.ours, case.torch) if f]
    times: list[list[float]] = [[] for _ in timed]
    bandwidths = []
    for _ in range(timer.rounds):
        bandwidths.append(timer.bandwidth())
        for measured, seen in zip(timed, times, strict=True):
            seen.append(measured())
    ours, *peer = (statistics.median(seen) for seen in times)
    return ours, peer[0] if peer else None, statistics.median(bandwidths)


def run(
    report: Report,
    timer: CpuTimer | GpuTimer,
    config: CsmConfig,
    dtypes: list[torch.dtype],
    batches: list[int],
    only: list[str] | None,
) -> None:
    table = report.table(
        "kernels",
        ["op", "shape", "dtype", "ms", "GB/s", "Gop/s", "% roofline", "torch ms", "x torch"],
    )
    for dtype in dtypes:
        for batch in batches:
            with torch.device(timer.device):
                all_cases = cases(config, dtype, batch, timer.device)
            for case in all_cases:
                if only and case.op not in only:
                    continue
                rate = timer.rate(case.multiplied or dtype)
                ms, peer_ms, bandwidth = measure(case, timer)
                floor_ms = max(case.num_bytes / bandwidth, case.flops / rate) * 1e3
                table.add(
                    *(case.op, case.shape, str(dtype).removeprefix("torch.")),
                    *(ms, case.num_bytes / ms / 1e6, case.flops / ms / 1e6),
                    *(100 * floor_ms / ms, peer_ms, peer_ms and peer_ms / ms),
                )
