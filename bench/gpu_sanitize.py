"""The four tools of compute-sanitizer over small cases of every op, on a GPU.

    python bench/gpu_sanitize.py --planted PROGRAM --save FILE [--seconds 120] [memcheck ...]

A tool is believed only if it finds the bug that was planted for it, and nothing in the sound kernel
beside it: PROGRAM is tests/sanitize/planted.cu, compiled. Then it watches
tests/support/sanitizer_cases.py. The tools run side by side. Writes FILE after each,
and beside it what a tool said of the ops, as TOOL.log; exits with 1 if one found something or could
not look.
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
SMALL_OPS = (sys.executable, str(ROOT / "tests" / "support" / "sanitizer_cases.py"), "native-cuda")
# Ours alone are watched, but for initcheck: what torch's kernels write is written all the same.
OURS = ("--kernel-name", "kernel_substring=voxkern")
TOOLS = {
    # torch asks for driver functions that need not be there: errors of calls are not its business.
    "memcheck": ("out of bounds", ("--report-api-errors", "no"), OURS),
    "racecheck": ("shared race", (), OURS),
    "synccheck": ("divergent barrier", (), OURS),
    "initcheck": ("uninitialised", (), ()),
}
"""The bug that each must find, its options, and those for the ops."""
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def findings(output: str) -> int | None:
    """How many errors or hazards a tool counted; None if it did not get that far."""
    counts = [int(a or b) for a, b in SUMMARY.findall(output)]
    return sum(counts) if counts else None


def verdict(sound: int | None, planted: int | None, ops: int | None, ops_ok: bool) -> str:
    """ "clean", or what is wrong, in a few words."""
    if sound is None or planted is None:
        return "the tool does not run here"
    if sound:
        return f"{sound} findings in a sound kernel"
    if not planted:
        return "the planted bug was not found"
    if ops is None:
        return "no end of the ops within the time"
    if ops:
        return f"{ops} findings in the ops"
    return "clean" if ops_ok else "the ops failed under the tool"


def watch(tool: str, command: tuple[str, ...], port: int, deadline: float, *options: str) -> tuple:
    """Its output and the program's exit code, None past the deadline."""
    line = ("compute-sanitizer", "--tool", tool, "--port", str(port), *options, *command)
    # An allocation for each tensor: none hides behind another's end, or in what one left behind.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        with (
            tempfile.TemporaryFile() as output,
            subprocess.Popen(
                line, env=environment, stdout=output, stderr=subprocess.STDOUT, process_group=0
            ) as process,
        ):
            try:
                code = process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the program too, not the tool alone
                code = None
            output.seek(0)
            return output.read().decode(errors="replace"), code
    except OSError as error:
        return str(error), None


def examine(tool: str, index: int, planted: str, deadline: float, folder: Path) -> dict:
    """One tool's answers: sound kernel, planted bug, ops; what it said of those in `folder`."""
    bug, options, for_ops = TOOLS[tool]
    port, start = 49152 + 100 * index, time.monotonic()
    # A planted kernel that does not end must not cost the ops their time.
    soon = min(deadline, start + 30)
    sound, _ = watch(tool, (planted, "sound"), port, soon, *options)
    found, _ = watch(tool, (planted, bug), port, soon, *options)
    ops, code = watch(tool, SMALL_OPS, port, deadline, *options, *for_ops)
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
