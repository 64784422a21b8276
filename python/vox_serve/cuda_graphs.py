"""Work on a GPU that is recorded once and then repeated with one launch."""

import contextlib
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("vox_serve")

TILE_ROWS = 16
"""Rows that a product takes at a time: fewer cost it no less."""

_WARM_REPLAYS, _TIMED_REPLAYS = 2, 7
_FASTER = 0.99  # of the other's time; what is nearer may be chance


class Alternative(NamedTuple):
    """Another way to do what one of the functions does, kept where it is right and faster.

    Attributes:
        name: for the log.
        of: the function.
        function: the other way.
        prepare: of a number of rows, what comes before each replay of both.
        result: likewise, what both are then to leave the same.
        max_rows: with more rows it is not tried.
    """

    name: str
    of: Callable[[int], None]
    function: Callable[[int], None]
    prepare: Callable[[int], None]
    result: Callable[[int], Tensor]
    max_rows: int


class RowGraphs:
    """Functions of a number of rows as CUDA graphs, one for each of a few numbers.

    A number between them is rounded up: the functions must take rows that are not in use. What
    they read and write besides must lie in tensors that outlive them, and they must not wait for
    the GPU.

    Args:
        functions: bound methods, whose objects are not kept. Called with a number of rows, twice
            for each: libraries want to be called before they are recorded.
        max_rows: the largest number.
        alternatives: of some of the functions; called likewise. Replays of both graphs take turns,
            and one of them is kept.
    """

    def __init__(
        self,
        functions: Sequence[Callable[[int], None]],
        max_rows: int,
        alternatives: Sequence[Alternative] = (),
    ):
        self._max_rows = max_rows
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        # They never run side by side, and leave nothing there for one another. The largest comes
        # first, or the others' memory would not do for it.
        self._pool = torch.cuda.graph_pool_handle()
        rows = max_rows
        while rows:
            for function in functions:
                graph = self._record(function, rows)
                for other in alternatives:
                    if other.of == function and rows <= other.max_rows:
                        graph = self._faster(graph, other, rows)
                self._graphs[function.__name__, rows] = graph
            rows = next((n for n in range(rows - 1, 0, -1) if rounded_rows(n, max_rows) == n), 0)

    def __call__(self, function: Callable[[int], None], rows: int) -> None:
        """Repeat what one of the functions does with so many rows, or some more."""
        self._graphs[function.__name__, rounded_rows(rows, self._max_rows)].replay()

    def _record(self, function: Callable[[int], None], rows: int) -> torch.cuda.CUDAGraph:
        function(rows)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, pool=self._pool):
            function(rows)
        return graph

    def _faster(
        self, graph: torch.cuda.CUDAGraph, other: Alternative, rows: int
    ) -> torch.cuda.CUDAGraph:
        """`graph`, or the alternative's if that leaves the same in less time."""
        times: tuple[list[float], list[float]] = [], []
        try:
            graphs = graph, self._record(other.function, rows)
            for _ in range(_WARM_REPLAYS + _TIMED_REPLAYS):
                results = []
                for each, seen in zip(graphs, times, strict=True):
                    other.prepare(rows)
                    seen.append(_replay_ms(each))
                    results.append(other.result(rows).clone())
                if not torch.equal(*results):
                    logger.warning("%s, %d rows: left out: its results differ", other.name, rows)
                    return graph
        except RuntimeError as error:
            first = error.__context__ or error  # the end of a broken capture raises once more
            logger.warning("%s, %d rows: left out: %s", other.name, rows, first)
            # A broken capture may leave the old one as if it were still being filled.
            self._pool = torch.cuda.graph_pool_handle()
            return graph
        ms, other_ms = (statistics.median(seen[_WARM_REPLAYS:]) for seen in times)
        kept = int(other_ms < _FASTER * ms)
        logger.info(
            "%s, %d rows: %s: %.3f ms, without it %.3f ms",
            *(other.name, rows, "kept" if kept else "not kept", other_ms, ms),
        )
        return graphs[kept]


@contextlib.contextmanager
def capture(graph, pool=None, cuda=torch.cuda) -> Iterator[None]:
    """What is called within goes into the graph.

    Where that fails, so does the end of the capture, and torch leaves its own stream the current
    one and the random generator in a state that it may be used in by captures alone: every random
    tensor from then on would be an error. Both are put back.

    Args:
        graph: a `torch.cuda.CUDAGraph`.
        pool: memory that it shares with other graphs; None for its own.
        cuda: torch.cuda, or what stands in for it.
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
    """Of the second of two replays: the host hands it in while the first one runs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def rounded_rows(rows: int, max_rows: int) -> int:
    """The next number of rows that has a graph: powers of two to 16, then multiples of 16, of 32
    from 128 on, of 64 from 256 on, ..."""
    step = 1 << (rows - 1).bit_length()
    if rows > TILE_ROWS:
        step = max(TILE_ROWS, step // 8)
    return min(-(-rows // step) * step, max_rows)
