"""Timers for calls: by the clock on a CPU, by events and CUDA graphs on a GPU.

On a GPU, a launch costs the host more time than a small kernel costs the device. Enough calls to
take a few milliseconds are therefore captured in a CUDA graph, and events time its replays: the
figure is device time, including the gaps between the graph's kernels. Calls that cannot be captured
are timed without a graph and reported. Clock frequencies are left as they are.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from functools import cached_property

import roofline
import torch

from vox_serve.cuda_graphs import capture

OPENMP_SPIN_S = 0.01
"""Time for torch's threads to go idle: after a parallel op they spin on their cores for some
milliseconds."""


class CpuTimer:
    """Times calls on all threads; the bandwidth is that of a plain read probe."""

    device = "cpu"
    rotate_bytes = 256 << 20
    """Amount of memory that inputs rotate through: several times a last-level cache."""
    rounds = 7

    def bandwidth(self) -> float:
        """Bytes read per second, measured now."""
        return roofline.read_bandwidth()

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second."""
        return roofline.median_of(roofline.multiply_rate, 3, dtype)

    def prepare(
        self, call: Callable, inputs: list[tuple], calls: int | None = None
    ) -> Callable[[], float]:
        """Returns a function that measures the milliseconds per call, cycling through the inputs.

        Args:
            call: the function to time.
            inputs: its arguments, one tuple or more.
            calls: calls per measurement; None for as many as take about 20 ms.
        """
        calls = calls or max(1, min(200, int(20 / self._time_ms(call, inputs, 2))))

        def measure() -> float:
            if calls > 1:
                time.sleep(OPENMP_SPIN_S)
            return self._time_ms(call, inputs, calls)

        return measure

    def _time_ms(self, call: Callable, inputs: list[tuple], calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            call(*inputs[i % len(inputs)])
        return (time.perf_counter() - start) / calls * 1e3


class GpuTimer:
    """Times calls on the current GPU; the bandwidth is that of a copy, reads and writes.

    Args:
        cuda: torch.cuda, or its stand-in `Rehearsal`.
        device: device of the tensors.
        copy_bytes: size of the copied buffer, far more than L2 holds.
        matmul_size: rows and columns of the matrices whose product gives the rate.
    """

    rounds = 15
    warm_calls, graph_ms, max_calls = 3, 2.0, 400
    head_start_cycles = 3_000_000
    """The GPU waits this long before the timed work, so that the host has submitted all of it."""

    def __init__(
        self, cuda=torch.cuda, device: str = "cuda", copy_bytes: int = 1 << 30, matmul_size=8192
    ):
        self._cuda, self.device, self._matmul_size = cuda, device, matmul_size
        self.rotate_bytes = copy_bytes // 4
        self._copy_bytes = copy_bytes
        self._rates: dict[torch.dtype, float] = {}
        self.without_graph: list[str] = []
        """Reasons why calls could not be captured."""

    @cached_property
    def _copy(self) -> Callable[[], float]:
        a, b = torch.empty(2, self._copy_bytes, dtype=torch.uint8, device=self.device)
        a.fill_(1)
        b.fill_(2)
        return self.prepare(lambda: b.copy_(a), [()], 4)

    def bandwidth(self) -> float:
        """Bytes per second, read and written, measured now by a few copies."""
        return 2e3 * self._copy_bytes / self._copy()

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second of torch's large matrix product, random data, without TF32."""
        if dtype not in self._rates:
            n = self._matmul_size if dtype != torch.float32 else self._matmul_size // 2
            if dtype == torch.int8:
                x, w = torch.randint(-127, 128, (2, n, n), dtype=dtype, device=self.device)
                product = torch._int_mm
            else:
                x, w = torch.randn(2, n, n, device=self.device).to(dtype)
                product = torch.mm
            measure = self.prepare(lambda: product(x, w.T), [()], 4)
            self._rates[dtype] = 2e3 * n**3 / statistics.median(measure() for _ in range(5))
        return self._rates[dtype]

    def prepare(
        self, call: Callable, inputs: list[tuple], calls: int | None = None
    ) -> Callable[[], float]:
        """Like `CpuTimer.prepare`; `calls=None` makes as many as take a few milliseconds."""

        def run(count: int) -> None:
            for i in range(count):
                call(*inputs[i % len(inputs)])

        run(self.warm_calls)
        self._cuda.synchronize()
        if calls is None:
            estimate_ms = self._time_ms(lambda: run(self.warm_calls)) / self.warm_calls
            fitting = int(self.graph_ms / max(estimate_ms, 1e-4))
            # Every input once, then from the start again if time allows.
            calls = max(1, min(self.max_calls, max(fitting, len(inputs))))
        graph = self._cuda.CUDAGraph()
        try:
            with capture(graph, cuda=self._cuda):
                run(calls)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a broken capture raises a second error
            if "out of memory" in str(cause):
                raise
            self.without_graph.append(str(cause).splitlines()[0])
            self._cuda.synchronize()
            return lambda: self._time_ms(lambda: run(calls)) / calls
        self._time_ms(graph.replay)
        return lambda: self._time_ms(graph.replay) / calls

    def _time_ms(self, work: Callable[[], None]) -> float:
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda._sleep(self.head_start_cycles)
        start.record()
        work()
        end.record()
        self._cuda.synchronize()
        return start.elapsed_time(end)


class Rehearsal:
    """Stand-in for torch.cuda without a GPU: calls run once, replays do nothing."""

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: "Rehearsal.Event") -> float:
            return max((end.at - self.at) * 1e3, 1e-3)

    class CUDAGraph:
        def replay(self) -> None:
            pass

    class Generator:
        def clone_state(self) -> "Rehearsal.Generator":
            return self

        def graphsafe_set_state(self, state: "Rehearsal.Generator") -> None:
            pass

    default_generators = (Generator(),)

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def current_stream() -> str:
        return "current"

    @staticmethod
    def stream(stream: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext(stream)

    @staticmethod
    def graph(graph: CUDAGraph, pool: None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext(graph)

    @staticmethod
    def synchronize() -> None:
        pass

    @staticmethod
    def _sleep(cycles: int) -> None:
        pass


def timer_for(device: str, rehearse: bool) -> CpuTimer | GpuTimer:
    """The timer of a device, "cpu" or "cuda"; for a rehearsal, the GPU timer on CPU tensors."""
    if rehearse:
        timer = GpuTimer(Rehearsal, "cpu", copy_bytes=1 << 16, matmul_size=64)
        timer.rounds, timer.warm_calls, timer.max_calls = 2, 1, 3
        return timer
    return GpuTimer() if device == "cuda" else CpuTimer()
