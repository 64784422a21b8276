"""Work on a GPU that is recorded once and then repeated with one launch."""

from collections.abc import Callable, Sequence

import torch

TILE_ROWS = 16
"""Rows that a product takes at a time: fewer cost it no less."""


class RowGraphs:
    """Functions of a number of rows as CUDA graphs, one for each of a few numbers.

    A number between them is rounded up: the functions must take rows that are not in use. What
    they read and write besides must lie in tensors that outlive them, and they must not wait for
    the GPU.

    Args:
        functions: bound methods, whose objects are not kept. Called with a number of rows, twice
            for each: libraries want to be called before they are recorded.
        max_rows: the largest number.
    """

    def __init__(self, functions: Sequence[Callable[[int], None]], max_rows: int):
        self._max_rows = max_rows
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        # They never run side by side, and leave nothing there for one another. The largest comes
        # first, or the others' memory would not do for it.
        pool = torch.cuda.graph_pool_handle()
        rows = max_rows
        while rows:
            for function in functions:
                function(rows)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    function(rows)
                self._graphs[function.__name__, rows] = graph
            rows = next((n for n in range(rows - 1, 0, -1) if rounded_rows(n, max_rows) == n), 0)

    def __call__(self, function: Callable[[int], None], rows: int) -> None:
        """Repeat what one of the functions does with so many rows, or some more."""
        self._graphs[function.__name__, rounded_rows(rows, self._max_rows)].replay()


def rounded_rows(rows: int, max_rows: int) -> int:
    """The next number of rows that has a graph: powers of two to 16, then multiples of 16, of 32
    from 128 on, of 64 from 256 on, ..."""
    step = 1 << (rows - 1).bit_length()
    if rows > TILE_ROWS:
        step = max(TILE_ROWS, step // 8)
    return min(-(-rows // step) * step, max_rows)
