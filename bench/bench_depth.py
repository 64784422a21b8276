"""Questions about the depth decoder that only a GPU can answer, each a table of its own.

`depth`      milliseconds of 31 codes, as launches in a CUDA graph and as one persistent kernel
             with pipelines of several lengths: which is faster at how many rows, and which length
             is best.
`overlap`    kernels of one frame by the profiler's clock, without a graph: pairs of which the
             second begins before the first ends, and triples of which the third does. It tells
             whether dependent launches overlap, and how many at once.
`repeat`     equal calls, and calls with other neighbours in the batch: how many gave other codes
             than the first. Any number but 0 is a bug.
`cold`       microseconds of one draw after itself, after a copy that evicts L2, and after a frame
             of other kernels, which evicts its instructions: a frame pays the last.

On a CPU, or in a rehearsal, the tables have no meaning but show that the code works.
"""

import contextlib
import inspect
import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_frame import our_model
from report import Report
from timing import CpuTimer, GpuTimer
from torch import Tensor

from vox_serve.model import PERSISTENT_ROWS, CsmModel
from vox_serve.model_config import CsmConfig
from vox_serve.sampling import SamplingParams, SamplingRows
from voxkern import ops
from voxkern.persistent import decode_depth_persistent

MAX_STAGES = (2, 4, 8, 12)
"""Lengths of the persistent kernel's weight pipeline to compare, in stages."""
STAGES_VARIABLE = "VOXKERN_PERSISTENT_STAGES"
REPEATS = {"cpu": 3, "cuda": 1000}
NEIGHBOURS = {"cpu": 2, "cuda": 200}
COLD_DRAWS = {"cpu": 2, "cuda": 50}
ROWS = 8


def run(
    report: Report,
    timer: CpuTimer | GpuTimer,
    config: CsmConfig,
    precisions: list[str],
    batches: list[int],
) -> None:
    """Add the four tables to the report."""
    depth = report.table(
        "depth",
        [
            *("precision", "rows", "launches ms", "persistent ms"),
            *(f"{stages} stages ms" for stages in MAX_STAGES),
        ],
    )
    overlap = report.table(
        "overlap", ["precision", "rows", "kernels", "pairs", "triples", "busy us", "span us"]
    )
    repeat = report.table("repeat", ["precision", "rows", "what", "runs", "different"])
    cold = report.table("cold", ["rows", "what", "median us", "most us"])
    for precision in precisions:
        model = our_model(config, precision, timer.device)
        for rows in batches:
            arguments = depth_arguments(model, rows)
            depth.add(precision, rows, *_depth_ms(timer, arguments, rows))
            if timer.device == "cuda":
                overlap.add(precision, rows, *_overlaps(arguments))
            for what, call in _depth_calls(rows).items():
                runs = REPEATS[timer.device]
                repeat.add(precision, rows, what, runs, _different(call, arguments, runs))
        runs = NEIGHBOURS[timer.device]
        for what, call in _depth_calls(ROWS).items():
            different = _different_among_neighbours(call, depth_arguments(model, ROWS), runs)
            repeat.add(precision, ROWS, f"{what}, other neighbours", runs, different)
    for rows in batches:
        _time_cold_draws(cold, timer, model, rows)


def depth_arguments(model: CsmModel, rows: int) -> dict[str, Any]:
    """Arguments of `decode_depth` for random hidden states, sampled with top-k 50."""
    sampling = SamplingRows.of(
        [SamplingParams(temperature=0.9, top_k=50)] * rows, range(rows), model.device
    )
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, model.config.backbone.dim, generator=generator)
    code0 = torch.arange(rows) % model.config.audio_vocab_size
    return model.depth_arguments(
        hidden.to(model.device, model.dtype), code0.to(model.device), sampling
    )


def _depth_calls(rows: int) -> dict[str, Callable[..., Tensor]]:
    calls: dict[str, Callable[..., Tensor]] = {"launches": ops.decode_depth}
    if rows <= PERSISTENT_ROWS:
        calls["persistent"] = decode_depth_persistent
    return calls


def _depth_ms(
    timer: CpuTimer | GpuTimer, arguments: dict[str, Any], rows: int
) -> list[float | None]:
    """The columns of table `depth`: medians of rounds in which all variants take turns."""
    measures = [timer.prepare(lambda: ops.decode_depth(**arguments), [()])]
    if rows <= PERSISTENT_ROWS:
        for stages in (None, *MAX_STAGES):
            with _stages(stages):  # read when the kernel is launched, so when a graph is captured
                measures.append(timer.prepare(lambda: decode_depth_persistent(**arguments), [()]))
    rounds = [[measure() for measure in measures] for _ in range(timer.rounds)]
    medians: list[float | None] = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return medians + [None] * (2 + len(MAX_STAGES) - len(medians))


@contextlib.contextmanager
def _stages(stages: int | None) -> Iterator[None]:
    """Limit the persistent kernel's pipeline; None for no limit."""
    if stages is not None:
        os.environ[STAGES_VARIABLE] = str(stages)
    try:
        yield
    finally:
        os.environ.pop(STAGES_VARIABLE, None)


def _overlaps(arguments: dict[str, Any]) -> tuple[int, int, int, float, float]:
    """Kernels, overlapping pairs and triples, the kernels' own time and the span of all, in us."""
    from torch.profiler import ProfilerActivity, profile

    ops.decode_depth(**arguments)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        ops.decode_depth(**arguments)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    pairs = sum(second[0] < first[1] for first, second in itertools.pairwise(spans))
    triples = sum(third[0] < first[1] for first, third in zip(spans[:-2], spans[2:], strict=True))
    busy_us = sum(end - start for start, end in spans)
    return len(spans), pairs, triples, busy_us, max(end for _, end in spans) - spans[0][0]


def _different(call: Callable[..., Tensor], arguments: dict[str, Any], runs: int) -> int:
    """Count the calls, of `runs`, that give other codes than the first."""
    first = call(**arguments)
    return sum(not torch.equal(call(**arguments), first) for _ in range(runs))


def _different_among_neighbours(
    call: Callable[..., Tensor], arguments: dict[str, Any], runs: int
) -> int:
    """Count the batches, of `runs`, that change a row's codes when other rows are beside it."""
    expected = call(**arguments)
    names = ("hidden", "code0", *_row_arguments())
    different = 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(runs):
        rows = int(torch.randint(1, ROWS + 1, (), generator=generator))
        order = torch.randperm(ROWS, generator=generator)[:rows].to(expected.device)
        some = arguments | {name: arguments[name][order].contiguous() for name in names}
        different += not torch.equal(call(**some), expected[order])
    return different


def _row_arguments() -> list[str]:
    """The sampling arguments of `decode_depth` that have one value per row."""
    sampling = ("temperature", "top_k", "top_p", "min_p", "seeds", "frames")
    return [name for name in inspect.signature(ops.decode_depth).parameters if name in sampling]


def _time_cold_draws(table: Any, timer: CpuTimer | GpuTimer, model: CsmModel, rows: int) -> None:
    arguments = depth_arguments(model, rows)
    sampling = {name: arguments[name] for name in _row_arguments()}
    device = model.device
    logits = torch.randn(rows, model.config.audio_vocab_size, device=device).to(model.dtype)
    penalty = torch.ones(rows, device=device)
    history = torch.full((rows, 16), -1, device=device)
    evicting = torch.empty(2, timer.rotate_bytes // 2, dtype=torch.uint8, device=device)

    def draw() -> Tensor:
        return ops.sample_tokens(
            logits, repetition_penalty=penalty, history=history, codebook=1, **sampling
        )

    before: dict[str, Callable[[], object]] = {
        "after itself": draw,
        "after a copy": lambda: evicting[0].copy_(evicting[1]),
        "after a frame": lambda: (evicting[0].copy_(evicting[1]), ops.decode_depth(**arguments)),
    }
    for what, evict in before.items():
        times = []
        for _ in range(COLD_DRAWS[timer.device]):
            evict()
            times.append(1e3 * timer._time_ms(draw))
        table.add(rows, what, statistics.median(times), max(times))
