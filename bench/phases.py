"""A load that rises and falls, against a cluster whose replicas come and go.

    python bench/phases.py --url http://127.0.0.1:8000 --phases 2x20,10x60,2x60

Each phase is so many streams at once for so many seconds, each followed by the next one. A row for
each phase: the replicas that /health showed, the streams, those whose listener ran out of audio and
for how long, refusals, failures (neither complete nor refused), first audio, and audio a second.
The last line is JSON.
"""

import argparse
import asyncio
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import arrivals
import speech_load
from report import Report
from speech_client import Target


def num_replicas(url: str) -> int:
    """The replicas that can serve, by /health."""
    with urllib.request.urlopen(f"{url}/health") as answer:
        states = json.load(answer)["replicas"].values()
    return sum("reason" not in state for state in states)


async def watch(url: str, seen: list[int]) -> None:
    """Note each change of the number of replicas."""
    while True:
        number = await asyncio.to_thread(num_replicas, url)
        if not seen or seen[-1] != number:
            seen.append(number)
        await asyncio.sleep(1)


async def run(url: str, phases: Sequence[tuple[int, float]], report: Report) -> None:
    gaps, firsts = ("with gaps", "gap ms"), ("first p50", "first p95")
    names = ("replicas", "streams", *gaps, "refused", "failed", *firsts)
    table = report.table("phases", ["at once", "seconds", *names, "audio s/s"])
    target = Target(url)
    for index, (at_once, seconds) in enumerate(phases):
        seen: list[int] = []
        watching = asyncio.create_task(watch(url, seen))
        requests = arrivals.requests(f"phases {index}")
        streams, start_s = await speech_load.closed_loop(target, requests, at_once, seconds)
        watching.cancel()
        found = speech_load.figures(streams, start_s, seconds)
        audio, _ = speech_load.throughput(streams, start_s, 0.0, seconds)
        row = [found[name] for name in names[1:]]
        table.add(at_once, seconds, " ".join(map(str, seen)), *row, audio)
        for problem in speech_load.problems(streams):
            report.leave_out(f"phase {index}", problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--phases", default="2x20,10x60,2x60")
    parser.add_argument("--save", type=Path, help="a JSON file")
    args = parser.parse_args()
    parts = (phase.split("x") for phase in args.phases.split(","))
    report = Report()
    report.path = args.save
    asyncio.run(run(args.url, [(int(n), float(s)) for n, s in parts], report))
    print(report.json())


if __name__ == "__main__":
    main()
