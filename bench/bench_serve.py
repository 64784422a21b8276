"""An open-loop load on a speech server, with the listeners' side measured.

    python bench/run.py serve                                   this checkout's server
    python bench/run.py serve --policy fifo,deadline            its policies, in turn
    python bench/run.py serve --tree ../old                     beside another checkout's server
    python bench/run.py serve --url http://host:8000            a server that runs already
    python bench/run.py serve --url http://host:8000/v1/audio/speech --body '{"voice": "a"}'

The requests do not wait for each other: a slow server gets as many as a fast one. Texts are short
turns (half of them), sentences and paragraphs. Texts, seeds and times are drawn from --seed: equal
for all servers, different in every case, load and run. With several servers, all of them run, and
they take turns within each case; only one is under load at a time.

Cases (--cases; all by default):
    quiet             requests one after another: first audio of an idle server
    capacity          closed loop: so many streams at once (--at-once), the next one when one ends.
                      The most audio a second without a gap is load 1, of the best server
    eight-and-one     a short request while eight long streams run, and three quiet first audios
    eight-prompts     eight long texts at once: first audio of each
    poisson           Poisson arrivals at each load (--loads)
    burst             bursts of --burst requests, at the times of a Poisson process
    whole-under-load  Poisson arrivals, and a whole answer (not streamed) every four seconds

Columns, times in ms unless another unit is named:
    first             from the time a request was due to its first sample (after the WAV header)
    audible           until its listener hears the first 10 ms above -50 dBFS, in a playback that
                      starts with the first chunk
    with gaps         streams whose listener ran out of audio before the next chunk came, at least
                      once; gap ms is the total silence of all streams
    goodput           audio of streams without a gap that came while requests arrived, per second:
                      as streams (/s) and as seconds (x)
    refused           429 or 503, with the time to that answer
    failed            neither complete nor refused
    p95 / quiet       first p95 over that of the case quiet, of the first server
    differ            answers whose samples differ from another answer to the same text and seed: of
                      another server, or to the same request alone (three of each load)
    client cpu %      of one processor; client late ms is the 99th percentile of the client's delay

Options:
    --model, --flags "..."    of the servers started here (default: demo, the built-in voice)
    --capacity N              requests a second at load 1, instead of measuring it
    --seconds 60, --streams N duration of each load, or its number of requests
    --repeat 3                runs of each case, in turn; medians follow
    --clients N               own addresses (127.0.0.1 and on) that requests come from in turn, so
                              that a fair server takes them for different clients (default 1)
    --record FILE             writes every request with its time, text, frames and outcome, for
                              bench/simulate.py to replay
    --save FOLDER             writes serve.json and, if matplotlib is installed, serve.png there
"""

import argparse
import asyncio
import gc
import json
import shlex
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import speech_load
from report import Report, Table
from serve_cases import CASES, Plan, Row, capacity_of, warm_up
from serve_process import Server, started
from speech_client import Target

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "serve"


class Tables:
    """One table per case with a row per run; medians of the runs follow."""

    def __init__(self, report: Report, repeat: int):
        self.report = report
        self.repeat = repeat
        self._tables: dict[str, Table] = {}

    def add(self, case: str, server: str, run: int, row: Row) -> None:
        for problem in row.pop("problems"):
            self.report.leave_out(f"{case}, {server}, run {run}", problem)
        if case not in self._tables:
            self._tables[case] = self.report.table(case, ["server", "run", *row])
        self._tables[case].add(server, run, *row.values())

    def add_medians(self, case: str) -> None:
        """Rows with equal server and first column become one."""
        table = self._tables.get(case)
        if self.repeat == 1 or table is None:
            return
        groups: dict[tuple, list[tuple]] = {}
        for row in table.rows:
            by_level = table.columns[2] in ("load", "at once")
            groups.setdefault((row[0], row[2] if by_level else None), []).append(row)
        columns = [table.columns[0], "runs", *table.columns[2:]]
        medians = self.report.table(f"{case}: medians", columns)
        for (server, _), rows in groups.items():
            values = zip(*(row[2:] for row in rows), strict=True)
            medians.add(server, len(rows), *map(median, values))


def median(values: Sequence[float | None]) -> float | None:
    """The median of the values that are not None."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


async def measure(
    servers: list[Server], cases: list[str], plan: Plan, repeat: int, report: Report
) -> None:
    """Run the cases; servers take turns, in another order in every run."""
    tables = Tables(report, repeat)
    for server in servers:
        failed = speech_load.problems(await warm_up(server, plan))
        if failed:
            raise RuntimeError(f"{server.name} does not answer: {failed[0]}")
    for case in cases:
        rows: dict[str, list[Row]] = {server.name: [] for server in servers}
        for plan.run in range(repeat):
            for server in servers if plan.run % 2 == 0 else servers[::-1]:
                gc.collect()
                for row in await CASES[case](server, plan):
                    tables.add(case, server.name, plan.run + 1, row)
                    rows[server.name].append(row)
        tables.add_medians(case)
        if case == "quiet":
            plan.quiet_ms = median([row["first p95"] for row in rows[servers[0].name]])
        if case == "capacity" and plan.capacity is None:
            plan.capacity = choose_capacity(rows, report)


def choose_capacity(rows: dict[str, list[Row]], report: Report) -> float:
    """The best server's capacity, in requests a second; the median of its runs."""
    capacities = {}
    for name, measured in rows.items():
        by_level: dict[int, list[Row]] = {}
        for row in measured:
            by_level.setdefault(row["at once"], []).append(row)
        levels = [{k: median([r[k] for r in runs]) for k in runs[0]} for runs in by_level.values()]
        capacities[name], gapless = capacity_of(levels)
        if not gapless:
            report.leave_out(f"gapless capacity of {name}", "streams had gaps at every level")
    return max(capacities.values())


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python bench/run.py serve [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--url")
    parser.add_argument("--body", type=json.loads, default={})
    parser.add_argument("--policy")
    parser.add_argument("--tree", type=Path, action="append", default=[])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--flags", default="--log_level error")
    parser.add_argument("--loads", default="0.5,0.8,1,2")
    parser.add_argument("--at-once", default="4,8,16")
    parser.add_argument("--capacity", type=float)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--capacity-seconds", type=float, default=20.0)
    parser.add_argument("--streams", type=int, default=0)
    parser.add_argument("--burst", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args(argv)
    args.cases = args.cases.split(",")
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"--cases: there is no {', '.join(sorted(unknown))}")
    args.cases.sort(key=list(CASES).index)
    if args.url and (args.policy or args.tree):
        parser.error("--url measures one running server: leave out --policy and --tree")
    loaded = {"poisson", "burst", "whole-under-load"} & set(args.cases)
    if loaded and not args.capacity and "capacity" not in args.cases:
        parser.error(f"{', '.join(sorted(loaded))}: add --capacity N or the case capacity")
    if args.repeat < 1 or not 1 <= args.clients <= 250:
        parser.error("--repeat must be at least 1 and --clients from 1 to 250")
    return args


def start_servers(args: argparse.Namespace, stack: ExitStack) -> list[Server]:
    """The servers to compare: of each policy, of each other tree, or the one that runs already."""
    target = {"body": args.body, "clients": args.clients}
    if args.url:
        return [Server("server", Target(args.url, **target))]
    flags = ["--model", args.model, *shlex.split(args.flags)]
    choices: list[tuple[str, Path, list[str]]] = []
    for policy in args.policy.split(",") if args.policy else []:
        choices.append((policy, ROOT, [*flags, "--policy", policy]))
    if not args.policy:
        choices.append(("ours", ROOT, flags))
    choices += [(tree.resolve().name, tree.resolve(), flags) for tree in args.tree]
    return [
        stack.enter_context(started(name, tree, flags, LOGS / f"{name}.log", **target))
        for name, tree, flags in choices
    ]


def main(argv: Sequence[str], bandwidths: Callable[[], list[float]]) -> Report:
    """Run the bench.

    Args:
        argv: the options.
        bandwidths: measures the memory's read bandwidth, in GB/s, before and after.
    """
    args = parse(argv)
    plan = Plan(
        seconds=args.seconds,
        capacity_seconds=args.capacity_seconds,
        streams=args.streams,
        at_once=tuple(int(n) for n in args.at_once.split(",")),
        loads=tuple(float(x) for x in args.loads.split(",")),
        burst=args.burst,
        seed=args.seed,
        capacity=args.capacity,
    )
    report = Report()
    report.path = args.save and args.save / "serve.json"
    read = bandwidths()
    with ExitStack() as stack:
        servers = start_servers(args, stack)
        if servers[0].target.is_openai:
            plan.samples = None
        report.machine["servers"] = {server.name: server.describe() for server in servers}
        report.machine["load"] = described(plan, args)
        gc.freeze()
        try:
            asyncio.run(measure(servers, args.cases, plan, args.repeat, report))
        finally:
            report.machine["load"] = described(plan, args)
            for server in servers:  # with the step times that it has learnt
                report.machine["servers"][server.name] = server.describe()
            if args.record:
                write_record(args.record, plan, report)
    read = sorted(read + bandwidths())
    if read:
        spread = (read[0], statistics.median(read), read[-1])
        report.machine["read GB/s"] = dict(zip(("least", "median", "most"), spread, strict=True))
    report.save()
    if report.path:
        print(f"\n{report.path}")
        plot(report)
    print(report.json(), flush=True)
    return report


def plot(report: Report) -> None:
    """Plots the loads next to the results, if matplotlib is installed."""
    try:
        import plot_serve
    except ImportError as error:
        print(f"plot: left out, {error}")
        return
    results = json.loads(report.json())
    if any(results.get(case) for case in plot_serve.CASES):
        print(plot_serve.draw(results, report.path.with_suffix(".png")))


def described(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """The load's settings, for the results."""
    settings = ("seconds", "capacity_seconds", "streams", "burst", "seed", "capacity", "quiet_ms")
    return {name: getattr(plan, name) for name in settings} | {"clients": args.clients}


def write_record(path: Path, plan: Plan, report: Report) -> None:
    """Every request and its outcome; see `speech_load.recorded` and `fill_in_frames`."""
    speech_load.fill_in_frames([r for record in plan.records for r in record["requests"]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": report.machine, "loads": plan.records}) + "\n")
