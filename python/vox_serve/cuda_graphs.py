"""CUDA graphs: GPU work that is recorded once and replayed with one launch."""

import contextlib
import logging
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger("vox_serve")

TILE_ROWS = 16
"""Rows of a GEMM tile: fewer rows cost the same."""

_WARM_REPLAYS, _TIMED_REPLAYS = 2, 7
_MAX_TIME_RATIO = 0.99  # a smaller gain may be noise

Key = TypeVar("Key", bound=Hashable)


class Alternative(NamedTuple, Generic[Key]):
    """Another way to do the work of one function, used where it is exact and faster.

    Attributes:
        name: for the log.
        replaces: key of the function that it may replace.
        function: the alternative; takes a number of rows.
        prepare: called with the number of rows before each replay of either graph.
        result: the tensor, for a number of rows, that both graphs must produce identically.
        max_rows: the alternative is not tried with more rows.
    """

    name: str
    replaces: Key
    function: Callable[[int], None]
    prepare: Callable[[int], None]
    result: Callable[[int], Tensor]
    max_rows: int


class RowGraphs(Generic[Key]):
    """CUDA graphs of functions of a number of rows, recorded for a few numbers of rows.

    Other numbers are rounded up, so the functions must tolerate unused rows. Apart from rows, the
    tensors that they read and write must outlive the graphs, and they must not wait for the GPU.

    Args:
        functions: the functions by key; no reference to them is kept. For each recorded number of
            rows, each is called twice: libraries initialise in the first call, and the second is
            recorded.
        max_rows: the largest number of rows.
        alternatives: other ways to do the work of some functions; called in the same way. The
            replays of both graphs alternate, and the faster graph is kept.
    """

    def __init__(
        self,
        functions: Mapping[Key, Callable[[int], None]],
        max_rows: int,
        alternatives: Sequence[Alternative[Key]] = (),
    ) -> None:
        self._max_rows = max_rows
        self._graphs: dict[tuple[Key, int], torch.cuda.CUDAGraph] = {}
        # All graphs can share one pool: they never run side by side, and none needs memory that
        # another left there. The largest is recorded first, so that its memory suffices for all.
        self._pool = torch.cuda.graph_pool_handle()
        rows = max_rows
        while rows:
            for key, function in functions.items():
                graph = self._record(function, rows)
                for other in alternatives:
                    if other.replaces == key and rows <= other.max_rows:
                        graph = self._pick_faster(graph, other, rows)
                self._graphs[key, rows] = graph
            rows = next((n for n in range(rows - 1, 0, -1) if rounded_rows(n, max_rows) == n), 0)

    def __call__(self, key: Key, rows: int) -> None:
        """Replay a function's graph for this many rows, or the next recorded number above."""
        self._graphs[key, rounded_rows(rows, self._max_rows)].replay()

    def _record(self, function: Callable[[int], None], rows: int) -> torch.cuda.CUDAGraph:
        function(rows)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, pool=self._pool):
            function(rows)
        return graph

    def _pick_faster(
        self, graph: torch.cuda.CUDAGraph, other: Alternative[Key], rows: int
    ) -> torch.cuda.CUDAGraph:
        """The alternative's graph if it is faster and its results are equal; otherwise `graph`."""
        times: tuple[list[float], list[float]] = [], []
        try:
            graphs = graph, self._record(other.function, rows)
            for _ in range(_WARM_REPLAYS + _TIMED_REPLAYS):
                results = []
                for candidate, candidate_times in zip(graphs, times, strict=True):
                    other.prepare(rows)
                    candidate_times.append(_replay_ms(candidate))
                    results.append(other.result(rows).clone())
                if not torch.equal(*results):
                    logger.warning("%s, %d rows: left out: its results differ", other.name, rows)
                    return graph
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a broken capture raises a second error
            logger.warning("%s, %d rows: left out: %s", other.name, rows, cause)
            # A broken capture may leave the old pool marked as being in a capture.
            self._pool = torch.cuda.graph_pool_handle()
            return graph
        ms, other_ms = (statistics.median(measured[_WARM_REPLAYS:]) for measured in times)
        is_faster = other_ms < _MAX_TIME_RATIO * ms
        logger.info(
            "%s, %d rows: %s: %.3f ms, without it %.3f ms",
            *(other.name, rows, "kept" if is_faster else "not kept", other_ms, ms),
        )
        return graphs[int(is_faster)]


@contextlib.contextmanager
def capture(
    graph: torch.cuda.CUDAGraph, pool: tuple[int, int] | None = None, cuda: Any = torch.cuda
) -> Iterator[None]:
    """Record the work that is launched in the `with` block into a graph.

    If that fails, ending the capture fails as well, and torch leaves its capture stream current and
    the random generator in capture mode, in which every later random tensor raises an error. Both
    are restored here.

    Args:
        graph: the graph to record into.
        pool: a memory pool shared with other graphs; None for a pool of its own.
        cuda: `torch.cuda`, or a substitute in tests.
    """
    generator = cuda.default_generators[cuda.current_device()]
    state = generator.clone_state()
    try:
        with cuda.stream(cuda.current_stream()), cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        generator.graphsafe_set_state(state)
        raise


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of the second of two replays, which the host launches during the first."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def rounded_rows(rows: int, max_rows: int) -> int:
    """`rows` rounded up to a number that has a graph: powers of two to 16, then multiples of 16, of
    32 from 128 on, of 64 from 256 on, ..., at most `max_rows`."""
    step = 1 << (rows - 1).bit_length()
    if rows > TILE_ROWS:
        step = max(TILE_ROWS, step // 8)
    return min(-(-rows // step) * step, max_rows)
