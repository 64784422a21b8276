"""Every op at CSM-1B's shapes: time, bytes or operations per second, share of the roofline.

Backends, and plain torch, take turns on the same inputs. What they are to the first is the ratio of
their times: above 1 the first is faster. Inputs rotate through several times the last-level cache
where an op's own are large enough: in 64 sets at most, so that what is tiny stays in a cache, as it
does within a frame.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
from bench_backends import PERSISTENT, TORCH, compared, comparison, on, served_by
from codec_cases import codec_cases
from kernel_case import Case
from kernel_cases import cases
from report import Report
from timing import CpuTimer, GpuTimer

from vox_serve.model_config import CsmConfig
from voxkern.backend import backend_for, why_missing

MOST_SETS = 64


def measure(
    case: Case,
    calls: Sequence[Callable | None],
    timer: CpuTimer | GpuTimer,
    lost: Callable[[int, Exception], None],
) -> tuple[list[float | None], float]:
    """Median milliseconds of each of the calls, None where there is none, and bytes per second, all
    timed in turn. One behind the first that raises is left out, and `lost` called with which and
    why: what ours is compared with must not take ours with it."""
    sets = max(1, min(MOST_SETS, int(timer.rotate_bytes // case.num_bytes)))
    with torch.device(timer.device):
        inputs = [case.inputs() for _ in range(sets)]
    timed: list[Callable[[], float] | None] = []
    for i, call in enumerate(calls):
        try:
            timed.append(call and timer.prepare(call, inputs))
        except Exception as error:
            if i == 0:
                raise
            lost(i, error)
            timed.append(None)
    times: list[list[float]] = [[] for _ in timed]
    bandwidths = []
    for _ in range(timer.rounds):
        bandwidths.append(timer.bandwidth())
        for measured, seen in zip(timed, times, strict=True):
            if measured:
                seen.append(measured())
    medians = [statistics.median(seen) if seen else None for seen in times]
    return medians, statistics.median(bandwidths)


def calls_of(
    case: Case, backends: Sequence[str | None], device: str, report: Report
) -> list[Callable | None]:
    """What runs the case on each backend; None, and said, where one does not have the op."""
    calls: list[Callable | None] = []
    for name in backends:
        reason = name not in (None, TORCH) and why_missing(served_by(name), device, case.op)
        if reason:
            report.leave_out(f"{case.op} on {name}", reason)
        if reason:
            calls.append(None)
        elif name == PERSISTENT:
            calls.append(case.persistent and on(served_by(name), case.persistent))
        else:
            calls.append(case.torch if name == TORCH else on(name, case.ours))
    return calls


def run(
    report: Report,
    timer: CpuTimer | GpuTimer,
    config: CsmConfig,
    dtypes: list[torch.dtype],
    batches: list[int],
    only: list[str] | None,
    backends: Sequence[str | None] = (None, TORCH),
    packed_batches: list[int] | None = None,
) -> None:
    """`packed_batches` are those of packed weights, None for all of `batches`. A case of ours that
    raises is left out, the others are measured, and at the end the first error is raised."""
    broken: Exception | None = None
    table = report.table(
        "kernels",
        [
            *("op", "shape", "dtype", "backend", "ms", "GB/s", "Gop/s", "% roofline"),
            *compared(backends),
        ],
    )
    for dtype in dtypes:
        for batch in batches:
            with torch.device(timer.device):
                all_cases = cases(config, dtype, batch, timer.device)
                if not only or any(op.startswith("mimi_") for op in only):
                    try:
                        all_cases += codec_cases(dtype, batch, timer.device)
                    except ImportError as error:
                        report.leave_out("the codec's ops", error)
            for case in all_cases:
                if only and case.op not in only:
                    continue
                packed = case.multiplied == torch.int8
                if packed and packed_batches is not None and batch not in packed_batches:
                    continue
                calls = calls_of(case, backends, timer.device, report)
                if calls[0] is None:
                    continue

                def lost(i: int, error: Exception, case: Case = case) -> None:
                    report.leave_out(f"{case.op} {case.shape} on {backends[i]}", error)

                try:
                    rate = timer.rate(case.multiplied or dtype)
                    times, bandwidth = measure(case, calls, timer, lost)
                except Exception as error:
                    report.leave_out(f"{case.op} {case.shape}", error)
                    broken = broken or error
                    continue
                ms = times[0]
                floor_ms = max(case.num_bytes / bandwidth, case.flops / rate) * 1e3
                table.add(
                    *(case.op, case.shape, str(dtype).removeprefix("torch.")),
                    *(backends[0] or backend_for(timer.device, case.op), ms),
                    *(case.num_bytes / ms / 1e6, case.flops / ms / 1e6, 100 * floor_ms / ms),
                    *comparison(times),
                )
    if broken:
        raise broken
