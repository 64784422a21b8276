"""Processor time that a cluster's parts take under a load: engines, door, Ray and the client.

    python -m vox_serve.cluster --replicas 2 --num_threads 1 --port 8100 &
    python bench/cluster_cost.py --pid $! --url http://127.0.0.1:8100 --at-once 32 --seconds 60

A closed loop of streams, as the case `capacity` of bench/run.py serve. The command's own process is
the door; all others of the cluster are its descendants. Columns are percent of one processor.
"""

import argparse
import asyncio
import os
import time
from collections import Counter
from pathlib import Path

import arrivals
import speech_load
from report import Report
from speech_client import Target

WARM_SHARE = 0.25
PARTS = ("replicas", "door", "Ray", "client")


def processes() -> dict[int, tuple[int, float]]:
    """The parent of each process of the machine, and the processor time in seconds of itself and of
    its children that have ended."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            ticks = sum(map(int, fields[11:15]))
            found[int(entry.name)] = int(fields[1]), ticks / os.sysconf("SC_CLK_TCK")
    return found


def cpu_s(command: int) -> Counter[str]:
    """Processor time in seconds of each part of a cluster, by the command's process id."""
    known = processes()
    total: Counter[str] = Counter({"door": known[command][1]})
    for pid in known:
        parent = known[pid][0]
        while parent in known and parent != command:
            parent = known[parent][0]
        if parent == command:
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            total["replicas" if b":Replica" in title else "Ray"] += known[pid][1]
    return total


async def cost(command: int, warm_s: float, seconds: float) -> list[float]:
    """The parts' processor time from `warm_s` to `seconds` from now, and this process's, in percent
    of one processor."""
    await asyncio.sleep(warm_s)
    before, own, begun_s = cpu_s(command), time.process_time(), time.perf_counter()
    await asyncio.sleep(seconds - warm_s)
    used = cpu_s(command) - before
    used["client"] = time.process_time() - own
    return [100 * used[part] / (time.perf_counter() - begun_s) for part in PARTS]


async def run(args: argparse.Namespace, report: Report) -> None:
    parts = [f"{part} %" for part in PARTS]
    table = report.table("cost", ["at once", "audio s/s", "with gaps", "gap ms", "failed", *parts])
    for at_once in map(int, args.at_once.split(",")):
        requests = arrivals.requests(f"{args.seed} cost {at_once}")
        warm_s = WARM_SHARE * args.seconds
        shares, (streams, start_s) = await asyncio.gather(
            cost(args.pid, warm_s, args.seconds),
            speech_load.closed_loop(Target(args.url), requests, at_once, args.seconds),
        )
        audio, _ = speech_load.throughput(streams, start_s, warm_s, args.seconds)
        found = speech_load.figures(streams, start_s, args.seconds)
        gaps = [found[name] for name in ("with gaps", "gap ms", "failed")]
        table.add(at_once, audio, *gaps, *shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pid", type=int, required=True, help="of the cluster's command")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--at-once", default="32")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--save", type=Path, help="a JSON file")
    args = parser.parse_args()
    report = Report()
    report.path = args.save
    asyncio.run(run(args, report))
    print(report.json())


if __name__ == "__main__":
    main()
