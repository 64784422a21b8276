"""The parts of bench/gpu_check.py and gpu_sanitize.py that need no GPU; nothing is timed."""

import argparse
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_check
import gpu_requirements
import gpu_sanitize
import pytest
import torch
from gpu_results import card, count_tests, headlines, pack_logs

import sanitizer_cases
from ops_testing import moved


class Checked(gpu_check.Check):
    """A check whose stages run one line of Python each."""

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
        """A benchmark that hangs after its first row."""
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


def test_a_failed_stage_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
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


def test_a_benchmark_out_of_time_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "headlines", lambda tables: [])
    code, (stage,) = checked(tmp_path, monkeypatch, "frame")
    assert (code, stage["result"], stage["what"]) == (0, "cut", "1 rows, out of time")
    results = json.loads((tmp_path / "dry-run" / "gpu_check.json").read_text())
    assert (results["frame"], results["machine"]) == ([{"batch": 3}], {"cores": 2})


def test_results_include_all_logs(tmp_path, monkeypatch):
    """The logs of a failed stage and of an interrupted one are packed too."""
    with pytest.raises(KeyboardInterrupt):
        checked(tmp_path, monkeypatch, "ops", "speech", "kernels")
    stages = json.loads((tmp_path / "dry-run" / "gpu_check.json").read_text())["stages"]
    assert [s["what"] for s in stages] == ["first", "interrupted", ""]
    with tarfile.open(tmp_path / "dry-run" / "logs.tar.gz") as logs:
        assert logs.getnames() == ["ops.log"]
        assert logs.extractfile("ops.log").read() == b"first\n"


def test_a_long_log_keeps_its_end(tmp_path):
    (tmp_path / "a.log").write_text("beginning and end")
    (tmp_path / "b.xml").write_text("<all/>")
    pack_logs(tmp_path, tmp_path / "logs.tar.gz", max_bytes=7)
    with tarfile.open(tmp_path / "logs.tar.gz") as logs:
        kept = {name: logs.extractfile(name).read() for name in logs.getnames()}
    assert kept == {"a.log": b"and end", "b.xml": b"<all/>"}


def test_a_run_with_every_stage_passed_succeeds(tmp_path, monkeypatch):
    assert checked(tmp_path, monkeypatch, "kernels")[0] == 0


def test_a_failed_build_skips_the_other_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_requirements, "NEEDED_PROGRAMS", ("no-such-program",))
    monkeypatch.setenv("PATH", "")
    code, stages = checked(tmp_path, monkeypatch, "build", "kernels")
    assert code == 1
    assert stages[0]["what"] == "not installed: no-such-program"
    assert (stages[1]["result"], stages[1]["what"]) == ("left out", "there is no build")


def test_versions_outside_pyprojects_ranges_are_listed(tmp_path, monkeypatch):
    here = {"torch": "2.11.0+cu130", "tokenizers": "0.20", "transformers": "5.17.0"}
    monkeypatch.setattr(gpu_requirements, "version", here.__getitem__)
    monkeypatch.setattr(gpu_requirements, "PackageNotFoundError", KeyError)
    assert gpu_requirements.other_versions() == [
        "tokenizers 0.20 for >=0.21",
        "transformers 5.17.0 for <6,>=5.22",
    ]


def test_the_build_reports_absent_and_unsupported_packages(tmp_path, monkeypatch):
    class Built(Checked):
        def command(self, stage, command, log=None):
            return 0

    monkeypatch.setattr(gpu_requirements, "missing", list)
    monkeypatch.setattr(gpu_requirements, "absent", lambda: ["soxr"])
    monkeypatch.setattr(
        gpu_requirements, "other_versions", lambda: ["transformers 5.17.0 for >=5.18"]
    )
    monkeypatch.setitem(globals(), "Checked", Built)
    _, (stage,) = checked(tmp_path, monkeypatch, "build")
    assert stage["result"] == "passed"
    assert "skipped: soxr" in stage["what"]
    assert stage["what"].endswith("transformers 5.17.0 for >=5.18")


def test_programs_next_to_the_interpreter_are_found(monkeypatch):
    monkeypatch.setenv("PATH", "/bin")
    gpu_requirements.add_usual_places()
    assert gpu_requirements.os.environ["PATH"].split(":") == [
        *(str(Path(sys.executable).parent), "/bin", "/usr/local/cuda/bin")
    ]


def test_a_stage_without_time_left_fails(tmp_path, monkeypatch):
    code, stages = checked(tmp_path, monkeypatch, "kernels", seconds=5)
    assert (code, stages[0]["what"]) == (1, "no time left")


def test_the_shell_script_passes_its_options_on(capsys, monkeypatch):
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
    counts, failures = count_tests(report)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures == ["a::two: 1 != 2", "a::three: no such"]
    assert count_tests(tmp_path / "none.xml")[0]["passed"] == 0


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_card_names_a_folder(tmp_path):
    smi = program(tmp_path, "smi", "echo 'NVIDIA H100 80GB HBM3'; echo 'NVIDIA H100 80GB HBM3'")
    assert card(str(smi)) == "h100-80gb-hbm3"
    assert card(str(tmp_path / "none")) == "unknown"


def test_headlines_show_the_key_figures():
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
    frames[0] |= {"persistent ms": 3.6, "x persistent": 0.9}
    frames[1] |= {"persistent ms": None, "x persistent": None}
    assert headlines({"frame": [frames[0], frames[1] | {"batch": 1}]})[:2] == [
        "frame, batch 1, bfloat16: 4 ms, 70 % of the floor, persistent 3.6 ms (x 0.9)",
        "frame, batch 1, bfloat16: 40 ms, 70 % of the floor",
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
        ((0, 1, None, True), "the ops did not end in time"),
        ((0, 1, 0, False), "the ops failed under the tool"),
    ],
)
def test_a_tool_counts_only_if_it_finds_its_planted_bug(counts, words):
    assert gpu_sanitize.verdict(*counts) == words


@pytest.mark.parametrize("blind", ["", "racecheck"])
def test_every_tool_runs_on_its_planted_bug(tmp_path, monkeypatch, blind, capsys):
    """The stand-in for compute-sanitizer reports a finding unless the kernel is named "sound"."""
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


@pytest.mark.slow
def test_a_hanging_tool_is_killed_with_its_program(tmp_path, monkeypatch):
    left = tmp_path / "left"
    program(tmp_path, "compute-sanitizer", f"echo begun; (sleep 2; touch {left}) & wait")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answer = gpu_sanitize.run_tool("memcheck", ("planted", "sound"), 1, time.monotonic())
    assert answer == ("begun\n", None)
    time.sleep(1.5)
    assert not left.exists()


def test_planted_bugs_exist_in_the_source():
    source = (Path(__file__).parents[1] / "sanitize" / "planted.cu").read_text()
    for bug, *_ in gpu_sanitize.TOOLS.values():
        assert f'{{"{bug}", ' in source
    assert '{"sound", sound}' in source


def test_the_sanitizer_cases_match_the_references(target):
    ran = sanitizer_cases.run(target)
    plain = {"append_kv", "decode_attention", "linear", "sample_tokens", "decode_depth"}
    assert plain <= ran.keys()


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


@pytest.mark.slow
def test_a_broken_gpu_ends_the_process_and_names_the_test():
    folder = str(Path(__file__).parents[1] / "support")
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
