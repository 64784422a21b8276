"""The parts of the GPU benchmarks and their timing code that need no GPU."""

import contextlib
import copy
import itertools
import json
import os
from collections.abc import Callable

import bench_backends
import bench_depth
import bench_frame
import bench_kernels
import bench_steps
import pytest
import torch
from codec_cases import codec_cases
from csm_1b_shapes import config_for
from report import Report
from timing import GpuTimer, Rehearsal, timer_for

from vox_serve.model import PERSISTENT_ROWS, CsmModel
from voxkern import backend
from voxkern.backend import implementation


@pytest.mark.slow
def test_gpu_benches_rehearsed():
    """The GPU timing code on CPU tensors of a tiny model: every case is called and gets a row."""
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    ops = ["rms_norm", "decode_attention", "sample_tokens", "decode_backbone", "decode_depth"]
    bench_kernels.run(report, timer, config, [torch.bfloat16], [1, 3], ops)
    bench_frame.run(report, timer, config, ["bfloat16", "int8"], [1, 2], peer=False)
    tables = {table.name: table.rows for table in report.tables}
    kernels, frames = tables["kernels"], tables["frame"]
    assert [row[0] for row in tables["bytes"]] == list(bench_frame.PRECISIONS)
    assert {row[0] for row in kernels} == set(ops)
    assert [row[:2] for row in frames] == [(p, b) for p in ("bfloat16", "int8") for b in (1, 2)]
    assert {row[3] for row in kernels} == {row[2] for row in frames} == {"native"}
    assert not timer.without_graph


@pytest.mark.slow
def test_questions_about_the_depth_decoder_rehearsed(monkeypatch):
    monkeypatch.setattr(bench_depth, "REPEATS", {"cpu": 2})
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    bench_depth.run(report, timer, config, ["bfloat16"], [1])
    tables = {table.name: table.rows for table in report.tables}
    assert [len(tables[name]) for name in ("depth", "overlap", "repeat", "cold")] == [1, 0, 4, 3]
    assert [row[-1] for row in tables["repeat"]] == [0, 0, 0, 0]
    assert bench_depth.STAGES_VARIABLE not in os.environ


def test_questions_find_codes_that_change():
    calls = itertools.count()
    assert bench_depth._different(lambda: torch.tensor([next(calls) // 2]), {}, 5) == 4


@pytest.mark.slow
def test_steps_rehearsed():
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    timer.rounds = 1
    bench_steps.run(report, timer, config, ["float32"], [1, 2])
    assert [row[1:3] for row in report.tables[0].rows] == [
        (rows, tokens) for rows in (2, 1) for tokens in (0, 16, 64)
    ]


@pytest.mark.slow
def test_codec_cases_match_their_references():
    """Ours and torch's version of each case agree on equal inputs."""
    for case in codec_cases(torch.float32, 2, "cpu"):
        inputs = case.inputs()
        again = copy.deepcopy(inputs)
        torch.testing.assert_close(case.ours(*inputs), case.torch(*again), rtol=1e-3, atol=1e-4)
        assert case.num_bytes > 1e6
        assert case.flops > 1e6


def test_kernels_on_several_backends(monkeypatch):
    """Every backend runs every case; without the op, it gets a dash, or no row if it is first."""
    served = []

    def reason(backend: str, device: str, op: str | None = None) -> str | None:
        return "none of it" if (backend, op) == ("reference", "silu_mul") else None

    def count(name: str, backend: str):
        served.append((name, backend))
        return implementation(name, backend)

    monkeypatch.setattr(bench_kernels, "why_missing", reason)
    monkeypatch.setattr(backend, "implementation", count)
    timer, config = timer_for("cuda", rehearse=True), config_for(rehearse=True)
    tables = []
    for beside in (("native", "reference", "torch"), ("reference", "native")):
        report = Report()
        ops = ["rms_norm", "silu_mul"]
        bench_kernels.run(report, timer, config, [torch.float32], [2], ops, beside)
        tables.append(json.loads(report.json()))
    (norm, silu), (alone,) = (table["kernels"] for table in tables)
    assert set(served) == {(op, "native") for op in ops} | {("rms_norm", "reference")}
    assert norm["backend"] == silu["backend"] == "native"
    assert norm["x reference"] == norm["reference ms"] / norm["ms"]
    assert (silu["reference ms"], silu["x reference"]) == (None, None)
    assert silu["torch ms"] > 0
    assert (alone["op"], alone["backend"]) == ("rms_norm", "reference")
    assert tables[0]["left out"] == tables[1]["left out"] == ["silu_mul on reference: none of it"]
    assert backend.forced() is None


def test_a_frame_on_two_backends():
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    beside = ["native", "reference"]
    bench_frame.run(report, timer, config, ["float32"], [1], peer=False, backends=beside)
    (row,) = json.loads(report.json())["frame"]
    assert row["backend"] == "native"
    assert row["x reference"] == row["reference ms"] / row["ms"]


def test_the_persistent_depth_decoder_has_its_own_column():
    """It fills in batches that the kernel supports, and for kernels only decode_depth's rows."""
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    beside = [None, bench_backends.PERSISTENT]
    batches = [1, PERSISTENT_ROWS + 1]
    bench_frame.run(report, timer, config, ["float32"], batches, peer=False, backends=beside)
    ops = ["rms_norm", "decode_depth"]
    bench_kernels.run(report, timer, config, [torch.float32], batches, ops, beside)
    tables = json.loads(report.json())
    for table, measured in (("frame", [True, False]), ("kernels", [False, True, False, False])):
        rows = tables[table]
        assert {row["backend"] for row in rows} == {"native"}
        assert [row["persistent ms"] is not None for row in rows] == measured
    row = tables["frame"][0]
    assert row["x persistent"] == row["persistent ms"] / row["ms"]
    assert "left out" not in tables


def test_a_frame_that_the_watchdog_ended_is_not_timed(monkeypatch):
    persistent_calls = []

    def draw(model, hidden, rows, persistent=False, whole=CsmModel.draw_frames):
        codes = whole(model, hidden, rows)
        persistent_calls.extend([True] * persistent)
        if len(persistent_calls) == 2:  # the last call: replays in a rehearsal do nothing
            codes[:, 1:] = -1
        return codes

    monkeypatch.setattr(CsmModel, "draw_frames", draw)
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    beside = ["native", bench_backends.PERSISTENT]
    bench_frame.run(report, timer, config, ["float32"], [1], peer=False, backends=beside)
    tables = json.loads(report.json())
    assert len(persistent_calls) == 2
    assert tables["frame"][0]["ms"] > 0
    assert tables["frame"][0]["persistent ms"] is None
    assert tables["left out"] == [
        "persistent beside float32 at batch 1: decode_depth's watchdog ended a frame"
    ]


class Broken:
    """A peer that raises."""

    def frames_ms(self, frames):
        raise RuntimeError("no kernel for it\nmore")


def test_a_peer_that_raises_is_left_out_and_ours_is_measured(monkeypatch):
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    monkeypatch.setattr(bench_frame, "their_frames", lambda *_: Broken())
    monkeypatch.setattr(bench_frame, "MAX_PEER_BATCH", {"cpu": 1})
    bench_frame.run(report, timer, config, ["float32"], [1, 2], peer=True)

    def prepare(call, inputs, calls=None, whole=timer.prepare):
        if call is plain_torch:
            raise RuntimeError("no memory for it")
        return whole(call, inputs, calls)

    all_cases = bench_kernels.cases
    plain_torch: Callable = len

    def two_cases(*args):
        nonlocal plain_torch
        one, two = (case for case in all_cases(*args) if case.op in ("rms_norm", "silu_mul"))
        plain_torch = two.torch
        return [one, two]

    monkeypatch.setattr(bench_kernels, "cases", two_cases)
    monkeypatch.setattr(timer, "prepare", prepare)
    bench_kernels.run(report, timer, config, [torch.float32], [2], ["rms_norm", "silu_mul"])
    tables = json.loads(report.json())
    assert [(row["batch"], row["transformers ms"]) for row in tables["frame"]] == [
        *((1, None), (2, None))
    ]
    norm, silu = tables["kernels"]
    assert norm["torch ms"] > 0
    assert silu["ms"] > 0
    assert silu["torch ms"] is None
    left_out = tables["left out"]
    assert left_out[0] == "transformers beside float32 at batch 1: no kernel for it"
    assert left_out[1].startswith("silu_mul [2, 2 x")
    assert left_out[1].endswith("on torch: no memory for it")


def test_a_case_of_ours_that_raises_leaves_the_others_measured(monkeypatch):
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()

    def raising(*_):
        raise RuntimeError("too many resources")

    def cases(*args, all_cases=bench_kernels.cases):
        chosen = [case for case in all_cases(*args) if case.op in ("rms_norm", "silu_mul")]
        chosen[0].ours = raising
        return chosen

    monkeypatch.setattr(bench_kernels, "cases", cases)
    with pytest.raises(RuntimeError, match="too many resources"):
        bench_kernels.run(report, timer, config, [torch.float32], [2], ["rms_norm", "silu_mul"])
    assert [row[0] for row in report.tables[0].rows] == ["silu_mul"]
    assert report.left_out[0].endswith(": too many resources")


def test_packed_weights_have_their_own_batches():
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    where = ([1, 3], ["linear"], (None,), [3])
    bench_kernels.run(report, timer, config, [torch.bfloat16], *where)
    shapes = [row[1] for row in report.tables[0].rows]
    assert {shape.split()[0] for shape in shapes if "[1," in shape}.isdisjoint({"int8", "int4"})
    assert {"int8", "int4"} <= {shape.split()[0] for shape in shapes if "[3," in shape}


def test_rows_are_saved_as_they_are_added(tmp_path):
    report = Report()
    report.path = tmp_path / "new" / "rows.json"
    table = report.table("rows", ["what", "ms"])
    for n in (1, 2):
        table.add("a", n)
        assert len(json.loads(report.path.read_text())["rows"]) == n


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("opencl", "opencl: there is no such backend"),
        ("native,triton,torch", "triton: Triton runs CPU tensors only"),
        ("torch,native", "torch,native: the first is measured"),
        ("persistent,native", "persistent,native: the first is measured"),
        ("", ": there is no such backend"),
    ],
)
def test_backends_that_cannot_be_measured(names, reason, monkeypatch):
    monkeypatch.setattr(
        bench_backends,
        "why_missing",
        lambda name, device: {
            "native": None,
            "triton": "Triton runs CPU tensors only under TRITON_INTERPRET=1",
        }.get(name, "there is no such backend: choose one of native, triton, reference"),
    )
    with pytest.raises(ValueError, match=reason):
        bench_backends.parse_backends(names, "cpu")
    assert bench_backends.parse_backends("native,torch,native", "cpu") == ["native", "torch"]
    assert bench_backends.parse_backends("native,persistent", "cpu") == ["native", "persistent"]


def test_calls_that_cannot_be_captured_are_timed_without_a_graph():
    class NoGraphs(Rehearsal):
        @staticmethod
        def graph(graph, pool):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    timer, calls = GpuTimer(NoGraphs, "cpu", copy_bytes=64, matmul_size=8), []
    measure = timer.prepare(calls.append, [(1,), (2,)], calls=3)
    assert timer.without_graph == ["operation not permitted when stream is capturing"]
    calls.clear()
    assert measure() > 0
    assert calls == [1, 2, 1]


def test_a_failed_capture_restores_stream_and_generator():
    """torch.cuda does not: its exit from a failed capture raises before it cleans up."""
    now = {"stream": "current", "state": "plain"}

    class Generator:
        def clone_state(self):
            return now["state"]

        def graphsafe_set_state(self, state):
            now["state"] = state

    class Cuda(Rehearsal):
        default_generators = (Generator(),)

        @staticmethod
        @contextlib.contextmanager
        def stream(stream):
            before = now["stream"]
            now["stream"] = stream
            try:
                yield
            finally:
                now["stream"] = before

        @staticmethod
        @contextlib.contextmanager
        def graph(graph, pool):
            now.update(stream="capturing", state="capturing")
            try:
                yield
            finally:
                raise RuntimeError("failed due to a previous error")

    def call():
        if now["stream"] == "capturing":
            raise RuntimeError("waits for the host")

    timer = GpuTimer(Cuda, "cpu", copy_bytes=64, matmul_size=8)
    assert timer.prepare(call, [()], calls=1)() > 0
    assert timer.without_graph == ["waits for the host"]
    assert now == {"stream": "current", "state": "plain"}
