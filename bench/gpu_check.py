"""Build, test and benchmark on a GPU in one run of less than ten minutes.

    bench/gpu_check.sh [--stages build,ops,engine,frame,...] [--dry-run]

Stages, in this order. A stage is limited by its own time limit and by the rest of `--seconds`:

    build      CMake and ninja, in build/gpu, for the installed GPU; installs into voxkern/.
               Incremental. The same sources and flags as `pip install`.
    ops        every op test on the GPU
    engine     tests/serve/test_cuda.py and test_engine.py: greedy codes equal to the CPU's, a
               frame as a CUDA graph, batches, the command-line programs, the server
    frame      bench/run.py frame: whole frames
    sanitize   compute-sanitizer's four tools, each shown to find a planted bug
    kernels    bench/run.py kernels: every op at batches of 1, 8, 64 and 256, packed weights at two
    speech     bench/run.py speech: the engine's steps, codec included, at batches that show whether
               400 streams are served in real time
    depth      bench/run.py depth: launches or one persistent kernel at 1, 2, 4 and 8 rows, and
               with which pipeline; whether dependent launches overlap; 1,000 equal runs; 200
               batches with other neighbours; what a cold draw costs
    steps      bench/run.py steps: time of a step by rows (1 to 2,048) and prompt tokens, memory of
               a stream: the table that scheduling starts from. depth and steps run only if
               `--stages` names them
    triton_ops, triton_engine, triton_frame, triton_kernels
               the same with the Triton kernels, compared with the CUDA kernels if those are built.
               They run only if `--stages` names them: they compile some hundreds of kernels, which
               are cached in build/gpu_check/triton for the next run

A failed stage does not stop the others, except that a failed build skips all of them, unless
VOXKERN_PREBUILT names a folder with _C.so and _C_cuda.so to use instead (`make gpu-carry`). A
benchmark that reaches its time limit keeps the rows it has: its result is "cut", which is not a
failure.
Results are written after every stage to RESULTS/CARD (`--results`, default bench/results):
gpu_check.json has each stage's result, all benchmark tables, the card with its driver and clocks,
and versions; logs.tar.gz has every stage's output and pytest's reports, from build/gpu_check. Exits
with 1 if a stage failed.

Requires Python with torch for CUDA, numpy, safetensors, tokenizers and pytest; a C++ compiler,
cmake, ninja and nvcc; compute-sanitizer. Tests that need transformers, fastapi, uvicorn,
python-multipart, soundfile, soxr or huggingface_hub are skipped without them; stage build lists the
missing packages and the versions that pyproject.toml does not allow. With pytest-xdist, tests run
in parallel. Needs no network. The Triton stages need Triton, and of CUDA only the driver: after
`pip install -e .` those four run on a machine without nvcc.

`--dry-run` is for a machine without a GPU: it builds for one (`--arch`), collects the tests,
compiles the planted bugs, runs the sanitizers' cases on the CPU and rehearses the benchmarks on a
tiny model. It writes its results to build/gpu_check as well.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gpu_requirements
from gpu_results import card, count_tests, headlines, pack_logs

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))  # nothing is installed yet

from vox_serve.console import standard_streams

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "gpu_check"
BUILD = ROOT / "build" / "gpu"
GRACE_S = 10
"""Time that an interrupted program has to end before it is killed."""


@dataclass
class Stage:
    """A stage and its result.

    Attributes:
        name: its name in `--stages`.
        limit_s: time limit of each of its commands.
        result: "passed", "failed", "cut" (a benchmark out of time, with rows), or "left out".
        what: a few words for the table.
        details: further results for the JSON file.
    """

    name: str
    limit_s: float
    result: str = "left out"
    what: str = ""
    seconds: float = 0.0
    details: dict = field(default_factory=dict)


STAGES = {
    "build": 240,
    "ops": 150,
    "engine": 100,
    "frame": 110,
    "sanitize": 130,
    "kernels": 120,
    "speech": 80,
    "depth": 300,
    "steps": 420,
    "triton_ops": 120,
    "triton_engine": 90,
    "triton_frame": 110,
    "triton_kernels": 120,
}
"""Time limits in seconds. They add up to more than a run has, since most stages take a fraction of
theirs. The most valuable stages come first: the last ones may have no time left."""
DEFAULT_STAGES = [
    name for name in STAGES if not name.startswith("triton") and name not in ("depth", "steps")
]


class Check:
    """One run over the stages."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.stages = [Stage(name, STAGES[name]) for name in args.stages]
        self.end = time.monotonic() + args.seconds
        self.machine: dict = {}
        self.tables: dict = {}
        WORK.mkdir(parents=True, exist_ok=True)
        for old in (*WORK.glob("*.log"), *WORK.glob("*.xml")):
            old.unlink()

    def run(self) -> int:
        for stage in self.stages:
            start = time.monotonic()
            built = next((s.result for s in self.stages if s.name == "build"), "passed")
            if built == "failed":
                stage.what = "there is no build"
            elif self.end - start < 15:
                stage.result, stage.what = "failed", "no time left"
            else:
                print(f"\n=== {stage.name}", flush=True)
                try:
                    getattr(self, stage.name)(stage)
                except Exception as error:  # a broken stage must not stop the others
                    stage.result, stage.what = "failed", f"{type(error).__name__}: {error}"
                except KeyboardInterrupt:  # keep what it has written
                    stage.result, stage.what = "failed", "interrupted"
                    self.save()
                    raise
            stage.seconds = round(time.monotonic() - start, 1)
            print(f"=== {stage.name}: {stage.result}, {stage.what}", flush=True)
            self.save()
        return self.summary()

    def build(self, stage: Stage) -> None:
        if missing := gpu_requirements.missing():
            stage.result, stage.what = "failed", f"not installed: {', '.join(missing)}"
            if not self.use_prebuilt(stage):
                return
        torch_path = Path(importlib.util.find_spec("torch").origin).parent
        configure = [
            *("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DVOXKERN_TORCH={torch_path}"),
            *("-DVOXKERN_CUDA=on", f"-DVOXKERN_CUDA_ARCHITECTURES={self.args.arch}"),
        ]
        targets = ["voxkern_cuda"] if self.args.dry_run else ["voxkern", "voxkern_cuda"]
        commands = [configure, ["cmake", "--build", BUILD, "--target", *targets]]
        if not self.args.dry_run:
            commands.append(["cmake", "--install", BUILD, "--prefix", ROOT / "voxkern"])
        for command in commands if "prebuilt" not in stage.details else []:
            if self.command(stage, command) != 0:
                self.fail(stage)
                if not self.use_prebuilt(stage):
                    return
                break
        if not self.args.dry_run:
            # Loads the extension for the first time, so a missing symbol is reported here.
            code = (
                "import json, sys, machine; from voxkern.backend import why_missing; "
                "print(json.dumps(machine.describe())); sys.exit(why_missing('native', 'cuda'))"
            )
            if self.command(stage, [sys.executable, "-c", code], log="machine") != 0:
                return self.fail(stage, "machine")
            lines = (WORK / "machine.log").read_text().splitlines()
            self.machine = json.loads(next(line for line in lines if line.startswith("{")))
        stage.details["versions"] = {
            name: gpu_requirements.program_version(name)
            for name in ("nvcc", "cmake", "compute-sanitizer")
        }
        built = f"for {self.args.arch or 'the installed GPU'}"
        if "prebuilt" in stage.details:
            built = f"FAILED, took the libraries of {stage.details['prebuilt']}"
        stage.result, stage.what = "passed", built
        if absent := gpu_requirements.absent():
            stage.what += f"; not installed, so some tests are skipped: {', '.join(absent)}"
        if others := gpu_requirements.other_versions():
            stage.what += f"; not allowed by pyproject.toml, so tests may fail: {', '.join(others)}"

    def use_prebuilt(self, stage: Stage) -> bool:
        """Install the libraries in VOXKERN_PREBUILT; False if it names none."""
        folder = Path(os.environ.get("VOXKERN_PREBUILT") or "none")
        libraries = [folder / name for name in ("_C.so", "_C_cuda.so")]
        if self.args.dry_run or not all(library.is_file() for library in libraries):
            return False
        for library in libraries:
            shutil.copy2(library, ROOT / "voxkern" / library.name)
        stage.details["prebuilt"] = str(folder)
        return True

    def ops(self, stage: Stage) -> None:
        if self.args.dry_run:
            return self.pytest(stage, [*self.op_tests(), "-k", "simt or opcheck"], min_passed=0)
        self.pytest(stage, [*self.op_tests(), "-k", "native-cuda or opcheck"], min_passed=100)

    def triton_ops(self, stage: Stage) -> None:
        self.pytest(stage, [*self.op_tests(), "-k", "triton"], min_passed=100, max_workers=12)

    @staticmethod
    def op_tests() -> list[str]:
        ops = sorted(path.stem for path in (ROOT / "voxkern" / "reference").glob("*.py"))
        files = [f"tests/ops/test_{op}.py" for op in ops]
        return [file for file in files if (ROOT / file).exists()]

    def engine(self, stage: Stage) -> None:
        files = ["tests/serve/test_cuda.py", "tests/serve/test_engine.py"]
        self.pytest(stage, [*files, "-k", "cuda and not triton"], min_passed=15)

    def triton_engine(self, stage: Stage) -> None:
        self.pytest(
            stage, ["tests/serve/test_cuda.py", "-k", "triton"], min_passed=8, max_workers=12
        )

    def sanitize(self, stage: Stage) -> None:
        planted = WORK / "planted"
        source = ROOT / "tests" / "sanitize" / "planted.cu"
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.args.arch.split(";") if a]
        command = ["nvcc", "-O1", "-lineinfo", *(targets or ["-arch=native"]), source]
        command += ["-o", planted]
        if self.command(stage, command) != 0:
            return self.fail(stage)
        if self.args.dry_run:
            command = [sys.executable, "tests/support/sanitizer_cases.py", "native-cpu"]
            if self.command(stage, command) != 0:
                return self.fail(stage)
            stage.result, stage.what = "passed", "planted bugs compile, the cases run on the CPU"
            return
        if not shutil.which("compute-sanitizer"):
            stage.result, stage.what = "failed", "not installed: compute-sanitizer"
            return
        answers = WORK / "sanitize.json"
        answers.unlink(missing_ok=True)
        # gpu_sanitize must end its children before it is ended itself.
        seconds = min(stage.limit_s, self.end - time.monotonic() - GRACE_S) - GRACE_S
        command = [sys.executable, "bench/gpu_sanitize.py", "--planted", planted]
        code = self.command(stage, [*command, "--save", answers, "--seconds", str(seconds)])
        tools = json.loads(answers.read_text()) if answers.exists() else []
        stage.details["tools"] = tools
        stage.what = ", ".join(f"{t['tool']} {t['result']}" for t in tools) or "no tool answered"
        stage.result = "failed" if code or len(tools) < 4 else "passed"

    def frame(self, stage: Stage) -> None:
        self.bench(stage, ["--batch", "1", "--quantize", "none"])

    def kernels(self, stage: Stage) -> None:
        # Half of the cases have packed weights: two batch sizes are enough for those.
        self.bench(stage, ["--batch", "1"], ["--packed-batch", "1,64"])

    def speech(self, stage: Stage) -> None:
        # Setting up a model and its requests takes longer than timing them, so few configurations.
        self.bench(
            stage,
            ["--batch", "1", "--quantize", "none"],
            ["--batch", "400,256", "--quantize", "none,int8"],
        )

    def depth(self, stage: Stage) -> None:
        self.bench(stage, ["--batch", "1", "--quantize", "none"])

    def steps(self, stage: Stage) -> None:
        self.bench(stage, ["--batch", "2", "--quantize", "none"], ["--quantize", "int8,none"])

    def triton_frame(self, stage: Stage) -> None:
        compared = ["--backend", self.triton_and_native(), "--no-peer"]
        rehearsed = [*compared, "--batch", "1", "--quantize", "none"]
        self.bench(stage, rehearsed, [*compared, "--batch", "1,64"])

    def triton_kernels(self, stage: Stage) -> None:
        compared = ["--backend", f"{self.triton_and_native()},torch"]
        rehearsed = [*compared, "--batch", "1", "--ops", "silu_mul"]
        self.bench(stage, rehearsed, [*compared, "--batch", "1,64"])

    def triton_and_native(self) -> str:
        built = self.args.dry_run or (ROOT / "voxkern" / "_C_cuda.so").exists()
        return "triton,native" if built else "triton"

    def bench(self, stage: Stage, rehearsed: list[str], on_gpu: Sequence[str] = ()) -> None:
        """Runs a benchmark, on the card or as a rehearsal; its table gets the stage's name."""
        name = stage.name.removeprefix("triton_")
        options = ["--rehearse", *rehearsed] if self.args.dry_run else ["--device", "cuda", *on_gpu]
        folder = WORK / stage.name
        saved = folder / f"{name}.json"
        saved.unlink(missing_ok=True)
        command = [sys.executable, "bench/run.py", name, "--save", folder, *options]
        code = self.command(stage, command)
        tables = json.loads(saved.read_text()) if saved.exists() else {}
        self.machine = tables.pop("machine", self.machine)
        left_out, rows = tables.pop("left out", []), tables.get(name, [])
        for table, found in tables.items():
            if found:
                key = stage.name if table == name else f"{stage.name}: {table}"
                self.tables[key] = found
                print(json.dumps({key: found}), flush=True)
        stage.what = f"{len(rows)} rows"
        if left_out:
            stage.details["left out"] = left_out
            stage.what += f", {len(left_out)} left out"
        stage.result = "passed" if code == 0 and rows else "failed"
        if code != 0:
            self.fail(stage)
        if code is None and rows:
            stage.result = "cut"

    def pytest(
        self, stage: Stage, arguments: list[str], min_passed: int, max_workers: int = 6
    ) -> None:
        """Runs tests; in a dry run only collects them. Fails if fewer than `min_passed` tests pass
        or none is found."""
        if self.args.dry_run:
            arguments = [*arguments, "--collect-only"]
        report = WORK / f"{stage.name}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # If a kernel never ends, the log shows the test that hangs.
        command += ["-o", "faulthandler_timeout=60", f"--junitxml={report}", *arguments]
        if importlib.util.find_spec("xdist") and "--collect-only" not in arguments:
            command += ["-n", str(min(max_workers, os.cpu_count() or 1))]
        code = self.command(stage, command)
        if "--collect-only" in arguments:
            stage.result, stage.what = ("failed" if code else "passed"), "collected"
            return
        counts, failures = count_tests(report)
        stage.details |= {"tests": counts, "failures": failures[:20]}
        stage.what = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        stage.result = "passed" if code == 0 and counts["passed"] >= min_passed else "failed"
        if code != 0:
            self.fail(stage)

    def command(self, stage: Stage, command: list, log: str | None = None) -> int | None:
        """Runs a command within the stage's time limit and writes its output to the log `log`, by
        default the stage's.

        Returns:
            The exit status; None if the time ran out.
        """
        limit = max(1.0, min(stage.limit_s, self.end - time.monotonic() - GRACE_S))
        path = [str(ROOT / folder) for folder in ("python", ".", "tests/support", "bench")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
        }
        if stage.name.startswith("triton"):
            environment["TRITON_CACHE_DIR"] = str(WORK / "triton")
            environment |= {"TRITON_INTERPRET": "1"} if self.args.dry_run else {}
        print("+", *(str(part) for part in command), flush=True)
        with (
            open(WORK / f"{log or stage.name}.log", "a") as file,
            subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                stage.details["out of time"] = " ".join(str(part) for part in command[:3])
                end_group(process)
                return None
            except KeyboardInterrupt:
                end_group(process)
                raise

    def fail(self, stage: Stage, log: str | None = None) -> None:
        lines = (WORK / f"{log or stage.name}.log").read_text(errors="replace").splitlines()
        stage.result = "failed"
        stage.details["output"] = lines[-60:]
        if "out of time" in stage.details:
            stage.what = f"{stage.what}, out of time".removeprefix(", ")
        elif not stage.what and lines:
            stage.what = lines[-1][:100]
        print("\n".join(lines[-40:]), flush=True)

    def save(self) -> Path:
        folder = WORK / "dry-run" if self.args.dry_run else self.args.results / card()
        folder.mkdir(parents=True, exist_ok=True)
        results = {
            "machine": self.machine,
            "stages": [asdict(stage) for stage in self.stages],
            **self.tables,
        }
        path = folder / "gpu_check.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        pack_logs(WORK, folder / "logs.tar.gz")
        return path

    def summary(self) -> int:
        print()
        for stage in self.stages:
            print(f"{stage.name:14} {stage.result:8} {stage.seconds:6.1f} s  {stage.what}")
        for line in headlines(self.tables):
            print(line)
        print(self.save())
        return int(any(stage.result == "failed" for stage in self.stages))


def end_group(process: subprocess.Popen) -> None:
    """Interrupts a program and its children, so that pytest and the benchmarks save their results;
    kills them after a grace period."""
    for number, wait_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


@standard_streams()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default=",".join(DEFAULT_STAGES))
    parser.add_argument("--seconds", type=float, default=570)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument(
        "--arch", default="", help="such as 90a; default: that of the installed GPU"
    )
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    if unknown := [name for name in args.stages if name not in STAGES]:
        parser.error(f"--stages: there is no {', '.join(unknown)}")
    if args.dry_run and not args.arch:
        args.arch = "90a"
    # A shell sets SIGINT to be ignored for background jobs, and all children would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    gpu_requirements.add_usual_places()
    return Check(args).run()


if __name__ == "__main__":
    sys.exit(main())
