"""RowGraphs keeps the faster of two equal graphs; on a fake GPU."""

import contextlib
from collections.abc import Callable

import pytest
import torch

from vox_serve.cuda_graphs import Alternative, RowGraphs


class Gpu:
    """A fake GPU, patched into torch.cuda. Graphs are lists of calls; only work advances time."""

    def __init__(self, monkeypatch):
        self.now_ms, self.recording = 0.0, None
        self.generator_state = "whole"
        gpu = self

        class CUDAGraph:
            def __init__(self):
                self.calls: list[Callable[[], None]] = []

            def replay(self):
                for call in self.calls:
                    call()

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self):
                self.at = gpu.now_ms

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Generator:
            def clone_state(self):
                return gpu.generator_state

            def graphsafe_set_state(self, state):
                gpu.generator_state = state

        @contextlib.contextmanager
        def graph(graph, pool):
            assert pool == "pool"
            gpu.recording, gpu.generator_state = graph, "captured"
            try:
                yield
                gpu.generator_state = "whole"
            finally:
                gpu.recording = None

        for name, value in {
            "CUDAGraph": CUDAGraph,
            "Event": Event,
            "graph": graph,
            "graph_pool_handle": lambda: "pool",
            "current_device": lambda: 0,
            "current_stream": lambda: "current",
            "stream": contextlib.nullcontext,
            "default_generators": (Generator(),),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def run(self, call: Callable[[], None]) -> None:
        """Run `call` now, or record it into the graph that is being captured."""
        self.recording.calls.append(call) if self.recording else call()


class Work:
    """Two functions, `draw` and `other`, that write 1, 2, ... to the rows of `result`.

    Args:
        ms, other_ms: durations of successive calls of each; the last one repeats.
        code: maps the number of calls of `other` so far to an error in its first row.
    """

    def __init__(self, gpu: Gpu, ms=(5.0,), other_ms=(5.0,), code=lambda calls: 0):
        self.gpu, self.code = gpu, code
        self.ms = {"draw": list(ms), "other": list(other_ms)}
        self.result = torch.zeros(32, dtype=torch.int64)
        self.calls: list[tuple[str, int]] = []

    def draw(self, rows: int) -> None:
        self.gpu.run(lambda: self._draw("draw", rows))

    def other(self, rows: int) -> None:
        self.gpu.run(lambda: self._draw("other", rows))

    def _draw(self, way: str, rows: int) -> None:
        ms = self.ms[way]
        self.gpu.now_ms += ms.pop(0) if len(ms) > 1 else ms[0]
        self.calls.append((way, rows))
        self.result[:rows] = torch.arange(1, rows + 1)
        if way == "other":
            self.result[0] += self.code(self.calls.count(("other", rows)))

    def graphs(self, max_rows: int, other: Callable | None = None) -> RowGraphs:
        alternative = Alternative(
            name="other",
            replaces="draw",
            function=other or self.other,
            prepare=lambda rows: self.result.fill_(-1),
            result=lambda rows: self.result[:rows],
            max_rows=8,
        )
        return RowGraphs({"draw": self.draw}, max_rows, [alternative])

    def kept(self, graphs: RowGraphs, rows: int) -> str:
        """Name of the function whose graph a call replays."""
        self.calls.clear()
        graphs("draw", rows)
        ((way, done),) = self.calls
        assert done >= rows
        return way


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return Gpu(monkeypatch)


# The first calls are slow, and later a single one.
@pytest.mark.parametrize(
    ("other_ms", "kept"),
    [
        ((90.0, 90.0, 4.0, 70.0, 4.0), "other"),
        ((1.0, 1.0, 1.0, 6.0), "draw"),
        ((4.99,), "draw"),
    ],
    ids=["faster", "slower", "as fast"],
)
def test_the_faster_graph_is_kept(gpu, caplog, other_ms, kept):
    caplog.set_level("INFO", "vox_serve")
    work = Work(gpu, other_ms=other_ms)
    graphs = work.graphs(1)
    assert work.kept(graphs, 1) == kept
    (line,) = caplog.messages
    word = "kept" if kept == "other" else "not kept"
    assert line == f"other, 1 rows: {word}: {other_ms[-1]:.3f} ms, without it 5.000 ms"


def test_each_number_of_rows_is_decided_separately(gpu):
    work = Work(gpu)
    times = {(way, rows): rows for way in ("draw", "other") for rows in (1, 2, 4, 8)}
    times["other", 2] = 1
    times["draw", 8] = 9
    slow = work._draw

    def draw(way: str, rows: int) -> None:
        slow(way, rows)
        gpu.now_ms += times[way, rows]

    work._draw = draw
    graphs = work.graphs(8)
    assert [work.kept(graphs, n) for n in (1, 2, 3, 4, 5, 8)] == [
        *("draw", "other", "draw", "draw", "other", "other")
    ]


@pytest.mark.parametrize("broken_call", [1, 2, 5])
def test_an_alternative_with_different_results_is_left_out(gpu, caplog, broken_call):
    """Call 1 is not a replay; a later call may be the first to give a wrong result."""
    work = Work(gpu, other_ms=(1.0,), code=lambda calls: -2 if calls >= broken_call else 0)
    graphs = work.graphs(1)
    assert work.kept(graphs, 1) == "draw"
    assert caplog.messages == ["other, 1 rows: left out: its results differ"]


def test_an_alternative_that_does_nothing_is_left_out(gpu, caplog):
    work = Work(gpu)
    assert work.kept(work.graphs(1, lambda rows: None), 1) == "draw"
    assert caplog.messages == ["other, 1 rows: left out: its results differ"]


@pytest.mark.parametrize("when", ["called", "recorded", "replayed"])
def test_an_alternative_that_raises_is_left_out(gpu, caplog, when):
    work = Work(gpu)

    def fail() -> None:
        raise RuntimeError("too many blocks to be resident")

    def raising(rows: int) -> None:
        if when == "replayed":
            return gpu.run(fail) if gpu.recording else None
        if when == "called" or gpu.recording:
            fail()
        work.other(rows)

    graphs = work.graphs(2, raising)
    assert [work.kept(graphs, n) for n in (1, 2)] == ["draw", "draw"]
    assert gpu.generator_state == "whole"
    assert caplog.messages == [
        f"other, {n} rows: left out: too many blocks to be resident" for n in (2, 1)
    ]


def test_above_max_rows_no_alternative_is_tried(gpu):
    """There, functions are called only to be recorded."""
    work = Work(gpu, other_ms=(1.0,))
    graphs = work.graphs(20)
    assert {rows for way, rows in work.calls if way == "other"} == {1, 2, 4, 8}
    assert work.calls[:2] == [("draw", 20), ("draw", 16)]
    assert [rows for way, rows in work.calls if rows > 8] == [20, 16]
    assert [work.kept(graphs, n) for n in (8, 9, 20)] == ["other", "draw", "draw"]


def test_functions_without_an_alternative_are_recorded(gpu):
    work = Work(gpu)
    graphs = RowGraphs({"draw": work.draw, "other": work.other}, 4)
    assert work.calls == [(way, rows) for rows in (4, 2, 1) for way in ("draw", "other")]
    graphs("other", 3)
    assert work.calls[-1] == ("other", 4)
