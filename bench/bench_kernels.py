"""Every op at CSM-1B's shapes: time, bytes or operations per second, share of the roofline.

Backends and plain torch take turns on the same inputs. Each one's ratio is its time over that of
the first backend: above 1, the first is faster. Inputs rotate through several times the last-level
cache if they are large enough for that: there are at most 64 sets, so tiny inputs stay in a cache,
as they do within a frame.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
from bench_backends import (
    PERSISTENT,
    TORCH,
    bind_backend,
    comparison_cells,
    comparison_columns,
    serving_backend,
)
from codec_cases import codec_cases
from kernel_case import Case
from kernel_cases import cases
from report import Report
from timing import CpuTimer, GpuTimer

from vox_serve.model_config import CsmConfig
from voxkern.backend import backend_for, why_missing

MAX_SETS = 64


def measure(
    case: Case,
    calls: Sequence[Callable | None],
    timer: CpuTimer | GpuTimer,
    on_error: Callable[[int, Exception], None],
) -> tuple[list[float | None], float]:
    """Times all calls in turn: median milliseconds of each (None for a missing one), and bytes per
    second. If a call other than the first raises, it is skipped and `on_error` gets its index and
    the error: a broken peer must not cost us our own figure."""
    sets = max(1, min(MAX_SETS, int(timer.rotate_bytes // case.num_bytes)))
    with torch.device(timer.device):
        inputs = [case.inputs() for _ in range(sets)]
    measures: list[Callable[[], float] | None] = []
    for i, call in enumerate(calls):
        try:
            measures.append(call and timer.prepare(call, inputs))
        except Exception as error:
            if i == 0:
                raise
            on_error(i, error)
            measures.append(None)
    times: list[list[float]] = [[] for _ in measures]
    bandwidths = []
    for _ in range(timer.rounds):
        bandwidths.append(timer.bandwidth())
        for measured, seen in zip(measures, times, strict=True):
            if measured:
                seen.append(measured())
    medians = [statistics.median(seen) if seen else None for seen in times]
    return medians, statistics.median(bandwidths)


def calls_for(
    case: Case, backends: Sequence[str | None], device: str, report: Report
) -> list[Callable | None]:
    """The function that runs the case on each backend; None, and reported, if one lacks the op."""
    calls: list[Callable | None] = []
    for name in backends:
        reason = name not in (None, TORCH) and why_missing(serving_backend(name), device, case.op)
        if reason:
            report.leave_out(f"{case.op} on {name}", reason)
        if reason:
            calls.append(None)
        elif name == PERSISTENT:
            calls.append(case.persistent and bind_backend(serving_backend(name), case.persistent))
        else:
            calls.append(case.torch if name == TORCH else bind_backend(name, case.ours))
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
    """Measures all cases. `packed_batches` are the batch sizes with packed weights; None means all
    of `batches`. If a case of ours raises, the others are still measured, and the first error is
    raised at the end."""
    broken: Exception | None = None
    table = report.table(
        "kernels",
        [
            *("op", "shape", "dtype", "backend", "ms", "GB/s", "Gop/s", "% roofline"),
            *comparison_columns(backends),
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
                calls = calls_for(case, backends, timer.device, report)
                if calls[0] is None:
                    continue

                def on_error(i: int, error: Exception, case: Case = case) -> None:
                    report.leave_out(f"{case.op} {case.shape} on {backends[i]}", error)

                try:
                    rate = timer.rate(case.multiplied or dtype)
                    times, bandwidth = measure(case, calls, timer, on_error)
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
                    *comparison_cells(times),
                )
    if broken:
        raise broken
