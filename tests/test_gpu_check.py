"""What a run on a GPU is made of, as far as no GPU is needed; nothing is timed."""

import argparse
import contextlib
import copy
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import backends
import bench_frame
import bench_kernels
import gpu_check
import gpu_needs
import gpu_sanitize
import pytest
import torch
from codec_cases import codec_cases
from csm_1b import config_for
from gpu_results import card, counts_of, headlines, pack_logs
from report import Report
from timing import GpuTimer, Rehearsal, timer_for

import small_ops
from ops_testing import moved
from voxkern import backend
from voxkern.backend import implementation


class Checked(gpu_check.Check):
    """Stages that run a line of Python each."""

    def ops(self, stage):
        code = self.command(stage, [sys.executable, "-c", "print('first'); raise SystemExit(3)"])
        if code:
            self.fail(stage)

    def engine(self, stage):
        stage.limit_s = 1
        line = "import time; print('begun', flush=True); time.sleep(60)"
        if self.command(stage, [sys.executable, "-c", line]) is None:
            self.fail(stage)

    def sanitize(self, stage):
        raise ValueError("broken")

    def kernels(self, stage):
        stage.result = "passed"

    def frame(self, stage):
        """A benchmark with a row that does not end."""
        stage.limit_s = 1
        self.bench(stage, [])

    def command(self, stage, command, log=None):
        if stage.name == "frame":
            folder = gpu_check.WORK / "frame"
            folder.mkdir()
            (folder / "frame.json").write_text('{"machine": {"cores": 2}, "frame": [{"batch": 3}]}')
            command = [sys.executable, "-c", "import time; time.sleep(60)"]
        return super().command(stage, command, log)

    def speech(self, stage):
        raise KeyboardInterrupt


def checked(tmp_path, monkeypatch, *stages: str, seconds: float = 60) -> tuple[int, list[dict]]:
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.5)
    args = argparse.Namespace(
        stages=stages, seconds=seconds, results=tmp_path, arch="90a", dry_run=True
    )
    code = Checked(args).run()
    return code, json.loads((tmp_path / "dry-run" / "gpu_check.json").read_text())["stages"]


def test_a_stage_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    code, stages = checked(tmp_path, monkeypatch, "ops", "engine", "sanitize", "kernels")
    assert code == 1
    assert [s["result"] for s in stages] == ["failed", "failed", "failed", "passed"]
    assert stages[0]["details"]["output"] == ["first"]
    assert stages[1]["what"] == "out of time"
    assert stages[1]["details"]["output"][0] == "begun"
    assert stages[1]["seconds"] < 30
    assert stages[2]["what"] == "ValueError: broken"
    shown = capsys.readouterr().out
    assert "ops            failed" in shown
    assert "kernels        passed" in shown


def test_a_benchmark_that_is_cut_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "headlines", lambda tables: [])
    code, (stage,) = checked(tmp_path, monkeypatch, "frame")
    assert (code, stage["result"], stage["what"]) == (0, "cut", "1 rows, out of time")
    results = json.loads((tmp_path / "dry-run" / "gpu_check.json").read_text())
    assert (results["frame"], results["machine"]) == ([{"batch": 3}], {"cores": 2})


def test_all_logs_come_with_the_results(tmp_path, monkeypatch):
    """Of a stage that failed, and of one that an end from outside has broken off."""
    with pytest.raises(KeyboardInterrupt):
        checked(tmp_path, monkeypatch, "ops", "speech", "kernels")
    stages = json.loads((tmp_path / "dry-run" / "gpu_check.json").read_text())["stages"]
    assert [s["what"] for s in stages] == ["first", "interrupted", ""]
    with tarfile.open(tmp_path / "dry-run" / "logs.tar.gz") as logs:
        assert logs.getnames() == ["ops.log"]
        assert logs.extractfile("ops.log").read() == b"first\n"


def test_of_a_long_log_the_end_is_kept(tmp_path):
    (tmp_path / "a.log").write_text("beginning and end")
    (tmp_path / "b.xml").write_text("<all/>")
    pack_logs(tmp_path, tmp_path / "logs.tar.gz", most_bytes=7)
    with tarfile.open(tmp_path / "logs.tar.gz") as logs:
        kept = {name: logs.extractfile(name).read() for name in logs.getnames()}
    assert kept == {"a.log": b"and end", "b.xml": b"<all/>"}


def test_all_that_passes_is_no_failure(tmp_path, monkeypatch):
    assert checked(tmp_path, monkeypatch, "kernels")[0] == 0


def test_without_a_build_nothing_is_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_needs, "NEEDED_PROGRAMS", ("no-such-program",))
    monkeypatch.setenv("PATH", "")
    code, stages = checked(tmp_path, monkeypatch, "build", "kernels")
    assert code == 1
    assert stages[0]["what"] == "not here: no-such-program"
    assert (stages[1]["result"], stages[1]["what"]) == ("left out", "there is no build")


def test_versions_that_pyproject_does_not_allow_are_said(tmp_path, monkeypatch):
    here = {"torch": "2.11.0+cu130", "tokenizers": "0.20", "transformers": "5.17.0"}
    monkeypatch.setattr(gpu_needs, "version", here.__getitem__)
    monkeypatch.setattr(gpu_needs, "PackageNotFoundError", KeyError)
    assert gpu_needs.other_versions() == [
        "tokenizers 0.20 for >=0.21",
        "transformers 5.17.0 for <6,>=5.18",
    ]


def test_the_build_says_what_is_not_as_it_should_be(tmp_path, monkeypatch):
    class Built(Checked):
        def command(self, stage, command, log=None):
            return 0

    monkeypatch.setattr(gpu_needs, "missing", list)
    monkeypatch.setattr(gpu_needs, "absent", lambda: ["soxr"])
    monkeypatch.setattr(gpu_needs, "other_versions", lambda: ["transformers 5.17.0 for >=5.18"])
    monkeypatch.setitem(globals(), "Checked", Built)
    _, (stage,) = checked(tmp_path, monkeypatch, "build")
    assert stage["result"] == "passed"
    assert "skipped: soxr" in stage["what"]
    assert stage["what"].endswith("transformers 5.17.0 for >=5.18")


def test_programs_beside_the_interpreter_are_found(monkeypatch):
    monkeypatch.setenv("PATH", "/bin")
    gpu_needs.add_usual_places()
    assert gpu_needs.os.environ["PATH"].split(":") == [
        *(str(Path(sys.executable).parent), "/bin", "/usr/local/cuda/bin")
    ]


def test_a_stage_past_the_end_is_a_failure(tmp_path, monkeypatch):
    code, stages = checked(tmp_path, monkeypatch, "kernels", seconds=5)
    assert (code, stages[0]["what"]) == (1, "no time left")


def test_the_shell_command_takes_its_options(capsys, monkeypatch):
    shell = Path(gpu_check.__file__).with_suffix(".sh")
    assert shell.stat().st_mode & 0o100
    assert "bench/gpu_check.py" in shell.read_text()
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--stages", "ops,nothing"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "there is no nothing" in capsys.readouterr().err


def test_tests_are_counted_from_pytests_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="1 != 2"/></testcase>'
        '<testcase classname="a" name="three"><error message="no such"/></testcase>'
        '<testcase classname="a" name="four"><skipped message="why"/></testcase>'
        "</testsuite></testsuites>"
    )
    counts, failures = counts_of(report)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures == ["a::two: 1 != 2", "a::three: no such"]
    assert counts_of(tmp_path / "none.xml")[0]["passed"] == 0


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_card_names_a_folder(tmp_path):
    smi = program(tmp_path, "smi", "echo 'NVIDIA H100 80GB HBM3'; echo 'NVIDIA H100 80GB HBM3'")
    assert card(str(smi)) == "h100-80gb-hbm3"
    assert card(str(tmp_path / "none")) == "unknown"


def test_headlines_are_the_figures_asked_for():
    frames = [
        {"precision": p, "batch": b, "ms": ms, "% roofline": 70.0, "streams": 80 / ms * b}
        for p, b, ms in (("bfloat16", 1, 4.0), ("bfloat16", 256, 40.0), ("bfloat16", 512, 90.0))
    ]
    shapes = [
        ("linear", "gate_up [1, 2048] x 16384"),
        ("linear", "gate_up [8, 2048] x 16384"),
        ("decode_attention", "64 x 2048 keys"),
        ("sample_tokens", "[256, 2051] top-k 50"),
    ]
    kernels = [{"op": op, "shape": s, "ms": 0.02, "% roofline": 90.0} for op, s in shapes]
    assert headlines({"frame": frames, "kernels": kernels}) == [
        "frame, batch 1, bfloat16: 4 ms, 70 % of the floor",
        "real-time streams without the codec: 512 (batch 256, bfloat16, 40 ms)",
        "linear gate_up [1, 2048] x 16384: 20 us, 90 % of the floor",
        "decode_attention 64 x 2048 keys: 20 us, 90 % of the floor",
        "sample_tokens [256, 2051] top-k 50: 20 us",
    ]
    assert headlines({"speech": frames[1:]}) == [
        "real-time streams in the engine: 512 (batch 256, bfloat16, 40 ms)"
    ]
    beside = [{"precision": "int4", "batch": b, "ms": 3.0, "native ms": 2.0} for b in (1, 64)]
    assert headlines({"triton_frame": beside}) == [
        "frame, batch 1, int4, Triton: 3 ms, with the CUDA kernels 2"
    ]
    assert headlines({}) == []


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((0, 1, 0, True), "clean"),
        ((None, 1, 0, True), "the tool does not run here"),
        ((0, None, 0, True), "the tool does not run here"),
        ((2, 1, 0, True), "2 findings in a sound kernel"),
        ((0, 0, 0, True), "the planted bug was not found"),
        ((0, 1, 5, True), "5 findings in the ops"),
        ((0, 1, None, True), "no end of the ops within the time"),
        ((0, 1, 0, False), "the ops failed under the tool"),
    ],
)
def test_a_tool_is_believed_if_it_finds_what_was_planted(counts, words):
    assert gpu_sanitize.verdict(*counts) == words


@pytest.mark.parametrize("blind", ["", "racecheck"])
def test_every_tool_is_given_its_planted_bug(tmp_path, monkeypatch, blind, capsys):
    """With a stand-in that finds something wherever the program's name is not "sound"."""
    script = (
        'tool=$2; for last in "$@"; do :; done; n=1\n'
        'case "$last" in sound|native-cuda) n=0;; esac\n'
        f'[ "$tool" = "{blind}" ] && n=0\n'
        '[ "$tool" = racecheck ] && echo "===== RACECHECK SUMMARY: $n hazards displayed" && exit\n'
        'echo "===== ERROR SUMMARY: $n errors"'
    )
    program(tmp_path, "compute-sanitizer", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    save = tmp_path / "answers.json"
    monkeypatch.setattr(sys, "argv", ["x", "--planted", "planted", "--save", str(save)])
    assert gpu_sanitize.main() == bool(blind)
    answers = {answer["tool"]: answer["result"] for answer in json.loads(save.read_text())}
    expected = dict.fromkeys(gpu_sanitize.TOOLS, "clean")
    assert answers == expected | ({blind: "the planted bug was not found"} if blind else {})
    assert "SUMMARY: 0" in (tmp_path / "initcheck.log").read_text()


def test_a_tool_that_does_not_end_is_ended_with_its_program(tmp_path, monkeypatch):
    left = tmp_path / "left"
    program(tmp_path, "compute-sanitizer", f"echo begun; (sleep 2; touch {left}) & wait")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answer = gpu_sanitize.watch("memcheck", ("planted", "sound"), 1, time.monotonic())
    assert answer == ("begun\n", None)
    time.sleep(1.5)
    assert not left.exists()


def test_planted_bugs_are_those_of_the_source():
    source = (Path(__file__).parent / "sanitize" / "planted.cu").read_text()
    for bug, *_ in gpu_sanitize.TOOLS.values():
        assert f'{{"{bug}", ' in source
    assert '{"sound", sound}' in source


def test_the_sanitizers_cases_are_right(target):
    ran = small_ops.run(target)
    plain = {"append_kv", "decode_attention", "linear", "sample_tokens", "decode_depth"}
    assert plain <= ran.keys()


def test_gpu_benches_rehearsed():
    """Their way of timing, on CPU tensors of a tiny model: every case is called and has a row."""
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    ops = ["rms_norm", "decode_attention", "sample_tokens", "decode_backbone", "decode_depth"]
    bench_kernels.run(report, timer, config, [torch.bfloat16], [1, 3], ops)
    bench_frame.run(report, timer, config, ["bfloat16", "int8"], [1, 2], peer=False)
    kernels, frames = (table.rows for table in report.tables)
    assert {row[0] for row in kernels} == set(ops)
    assert [row[:2] for row in frames] == [(p, b) for p in ("bfloat16", "int8") for b in (1, 2)]
    assert {row[3] for row in kernels} == {row[2] for row in frames} == {"native"}
    assert not timer.without_graph


def test_the_codecs_ops_are_measured():
    """Each against its reference, on inputs that are alike."""
    for case in codec_cases(torch.float32, 2, "cpu"):
        inputs = case.inputs()
        again = copy.deepcopy(inputs)
        torch.testing.assert_close(case.ours(*inputs), case.torch(*again), rtol=1e-3, atol=1e-4)
        assert case.num_bytes > 1e6
        assert case.flops > 1e6


def test_backends_beside_each_other(monkeypatch):
    """Each case runs on each of them; one that lacks an op has a dash, or no row if it is first."""
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


class Broken:
    """A peer that raises."""

    def frames_ms(self, frames):
        raise RuntimeError("no kernel for it\nmore")


def test_a_peer_that_raises_is_left_out_and_ours_goes_on(monkeypatch):
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    monkeypatch.setattr(bench_frame, "their_frames", lambda *_: Broken())
    monkeypatch.setattr(bench_frame, "MOST_PEER_BATCH", {"cpu": 1})
    bench_frame.run(report, timer, config, ["float32"], [1, 2], peer=True)

    def prepare(call, inputs, calls=None, whole=timer.prepare):
        if call is torch_way:
            raise RuntimeError("no memory for it")
        return whole(call, inputs, calls)

    all_cases = bench_kernels.cases
    torch_way: Callable = len

    def two_cases(*args):
        nonlocal torch_way
        one, two = (case for case in all_cases(*args) if case.op in ("rms_norm", "silu_mul"))
        torch_way = two.torch
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


def test_a_case_of_ours_that_raises_costs_no_other(monkeypatch):
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


def test_packed_weights_at_some_batches():
    timer, config, report = timer_for("cuda", rehearse=True), config_for(rehearse=True), Report()
    where = ([1, 3], ["linear"], (None,), [3])
    bench_kernels.run(report, timer, config, [torch.bfloat16], *where)
    shapes = [row[1] for row in report.tables[0].rows]
    assert {shape.split()[0] for shape in shapes if "[1," in shape}.isdisjoint({"int8", "int4"})
    assert {"int8", "int4"} <= {shape.split()[0] for shape in shapes if "[3," in shape}


def test_rows_are_written_as_they_come(tmp_path):
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
        ("", ": there is no such backend"),
    ],
)
def test_backends_that_cannot_be_measured(names, reason, monkeypatch):
    monkeypatch.setattr(
        backends,
        "why_missing",
        lambda name, device: {
            "native": None,
            "triton": "Triton runs CPU tensors only under TRITON_INTERPRET=1",
        }.get(name, "there is no such backend: choose one of native, triton, reference"),
    )
    with pytest.raises(ValueError, match=reason):
        backends.chosen(names, "cpu")
    assert backends.chosen("native,torch,native", "cpu") == ["native", "torch"]


def test_what_cannot_be_captured_is_timed_without_a_graph():
    class NoGraphs(Rehearsal):
        @staticmethod
        def graph(graph):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    timer, calls = GpuTimer(NoGraphs, "cpu", copy_bytes=64, matmul_size=8), []
    measure = timer.prepare(calls.append, [(1,), (2,)], calls=3)
    assert timer.without_graph == ["operation not permitted when stream is capturing"]
    calls.clear()
    assert measure() > 0
    assert calls == [1, 2, 1]


def test_a_failed_capture_leaves_stream_and_generator_as_they_were():
    """As torch.cuda does without: the end of a capture that failed raises before it tidies up."""
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
        def graph(graph):
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


BROKEN_GPU = """
import torch
import ops_testing

def synchronize():
    raise RuntimeError("an illegal memory access")

torch.cuda.synchronize = synchronize
ops_testing.end_if_gpu_is_broken("without a GPU")
torch.cuda.is_initialized = lambda: True
ops_testing.end_if_gpu_is_broken("test_it")
print("went on")
"""


def test_a_broken_gpu_ends_the_process_and_names_the_test():
    folder = str(Path(__file__).parent)
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN_GPU],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.endswith("test_it left the GPU unusable: an illegal memory access\n")


def test_moved_views_share_memory_and_keep_their_strides():
    base = torch.arange(40.0)
    rows = base.view(5, 8)[:, 2:6]
    one = base[3:4].expand(6)
    (there, many, [listed], number), copies = moved(
        [rows, one, [rows.T], 7], lambda memory: memory.clone()
    )
    assert len(copies) == 1
    assert torch.equal(there, rows)
    assert (there.stride(), there.storage_offset()) == (rows.stride(), rows.storage_offset())
    assert (many.stride(), number) == ((0,), 7)
    there[0, 1] = -1.0  # element 3 of base
    assert many.tolist() == [-1.0] * 6
    assert listed[1, 0] == -1
    assert base[3] == 3
    for here, elsewhere in copies:
        here.copy_(elsewhere)
    assert base[3] == -1
