"""Runs compute-sanitizer's four tools over small cases of every op, on a GPU.

    python bench/gpu_sanitize.py --planted PROGRAM --save FILE [--seconds 120] [memcheck ...]

A tool's result counts only if the tool finds the bug planted for it and nothing in the sound kernel
next to it: PROGRAM is tests/sanitize/planted.cu, compiled. It then runs
tests/support/sanitizer_cases.py. The tools run in parallel. Writes FILE after each tool, and in the
same folder its output on the ops as TOOL.log. Exits with 1 if a tool found something or could not
run.
"""

import argparse
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZER_CASES = (
    sys.executable,
    str(ROOT / "tests" / "support" / "sanitizer_cases.py"),
    "native-cuda",
)
# Checks only our kernels. initcheck must see torch's too: they initialise memory that ours read.
OUR_KERNELS = ("--kernel-name", "kernel_substring=voxkern")
TOOLS = {
    # torch probes for driver functions that may be missing, so API errors are not reported.
    "memcheck": ("out of bounds", ("--report-api-errors", "no"), OUR_KERNELS),
    "racecheck": ("shared race", (), OUR_KERNELS),
    "synccheck": ("divergent barrier", (), OUR_KERNELS),
    "initcheck": ("uninitialised", (), ()),
}
"""For each tool: its planted bug, its options, and further options for the ops."""
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def findings(output: str) -> int | None:
    """Number of errors or hazards in a tool's summary; None if it printed none."""
    counts = [int(a or b) for a, b in SUMMARY.findall(output)]
    return sum(counts) if counts else None


def verdict(sound: int | None, planted: int | None, ops: int | None, ops_ok: bool) -> str:
    """ "clean", or a short description of the problem."""
    if sound is None or planted is None:
        return "the tool does not run here"
    if sound:
        return f"{sound} findings in a sound kernel"
    if not planted:
        return "the planted bug was not found"
    if ops is None:
        return "the ops did not end in time"
    if ops:
        return f"{ops} findings in the ops"
    return "clean" if ops_ok else "the ops failed under the tool"


def run_tool(
    tool: str, command: tuple[str, ...], port: int, deadline: float, *options: str
) -> tuple:
    """Runs a command under a tool: output and exit code, which is None past the deadline."""
    arguments = ("compute-sanitizer", "--tool", tool, "--port", str(port), *options, *command)
    # One allocation per tensor: an overrun cannot hit a neighbour, nor a read find stale values.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        with (
            tempfile.TemporaryFile() as output,
            subprocess.Popen(
                arguments, env=environment, stdout=output, stderr=subprocess.STDOUT, process_group=0
            ) as process,
        ):
            try:
                code = process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # kills the program as well as the tool
                code = None
            output.seek(0)
            return output.read().decode(errors="replace"), code
    except OSError as error:
        return str(error), None


def examine(tool: str, index: int, planted: str, deadline: float, folder: Path) -> dict:
    """One tool's results for the sound kernel, its planted bug and the ops. Also writes the output
    on the ops to `folder`."""
    bug, options, op_options = TOOLS[tool]
    port, start = 49152 + 100 * index, time.monotonic()
    # A planted kernel that never ends must not use up the time for the ops.
    planted_deadline = min(deadline, start + 30)
    sound, _ = run_tool(tool, (planted, "sound"), port, planted_deadline, *options)
    found, _ = run_tool(tool, (planted, bug), port, planted_deadline, *options)
    ops, code = run_tool(tool, SANITIZER_CASES, port, deadline, *options, *op_options)
    (folder / f"{tool}.log").write_text(ops)
    counts = findings(sound), findings(found), findings(ops)
    result = verdict(*counts, ops_ok=code == 0)
    report = {
        "tool": tool,
        "result": result,
        "sound": counts[0],
        "planted": counts[1],
        "ops": counts[2],
        "seconds": round(time.monotonic() - start, 1),
    }
    if result != "clean":
        texts = {"sound": sound, "planted": found, "ops": ops}
        report["output"] = {name: text[-3000:] for name, text in texts.items()}
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", default=list(TOOLS), help="all of them by default")
    parser.add_argument("--planted", required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    if unknown := [tool for tool in args.tools if tool not in TOOLS]:
        parser.error(f"there is no {', '.join(unknown)}")
    deadline = time.monotonic() + args.seconds
    reports, lock = [], threading.Lock()

    def run(index: int, tool: str) -> None:
        report = examine(tool, index, args.planted, deadline, args.save.parent)
        with lock:
            reports.append(report)
            args.save.write_text(json.dumps(reports, indent=1))
            print(f"{tool}: {report['result']} ({report['seconds']} s)", flush=True)
            for name, text in report.get("output", {}).items():
                print(f"--- {tool}, {name}\n{text}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(len(args.tools)) as pool:
        list(pool.map(run, range(len(args.tools)), args.tools))
    return int(any(report["result"] != "clean" for report in reports))


if __name__ == "__main__":
    sys.exit(main())
