"""Work on a GPU that is recorded once and then repeated with one launch."""

from collections.abc import Callable

import torch

FULL_TILE_ROWS = 16
"""Rows that a product takes at a time: fewer cost it no less."""


class RowGraphs:
    """A function of a number of rows as CUDA graphs, one for each of a few numbers.

    A number between them is rounded up: the function must take rows that are not in use. What it
    reads and writes besides must lie in tensors that outlive it, and it must not wait for the GPU.

    Args:
        function: called with a number of rows, once for each, while its launches are recorded.
        max_rows: the largest number.
    """

    def __init__(self, function: Callable[[int], None], max_rows: int):
        self._function, self._max_rows = function, max_rows
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # They never run side by side, and leave nothing there for one another.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, rows: int) -> None:
        rows = rounded_rows(rows, self._max_rows)
        if rows not in self._graphs:
            self._graphs[rows] = self._record(rows)
        self._graphs[rows].replay()

    def record_all(self) -> None:
        """Record every graph, so that no call has to. The function is run, too."""
        # Libraries want to be called before they are recorded.
        self._function(self._max_rows)
        rows = 0
        while rows < self._max_rows:
            rows = rounded_rows(rows + 1, self._max_rows)
            self._graphs[rows] = self._record(rows)

    def _record(self, rows: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._function(rows)
        return graph


def rounded_rows(rows: int, max_rows: int) -> int:
    """The next number of rows that has a graph: a power of two to 16, then up to a quarter more."""
    step = 1 << (rows - 1).bit_length()
    if rows > FULL_TILE_ROWS:
        step = max(FULL_TILE_ROWS, step // 8)
    return min(-(-rows // step) * step, max_rows)
