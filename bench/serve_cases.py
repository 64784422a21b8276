"""The cases of bench/bench_serve.py: one function each, which measures one server once."""

import statistics
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import arrivals
import speech_load
from arrivals import Arrival
from serve_process import Server
from speech_client import Stream, speak

SHORT = "Hello there."
QUIET_REQUESTS = 7
BESIDE_PAUSE_S = 0.5
"""Time from the first audio of the eight long streams to the short request."""
LEAST_LIMIT_MS = 150.0
QUIET_TIMES = 3
"""Allowed first audio beside long streams: this many quiet ones, or the time above if that is more
(issue 17)."""
WARM_SHARE = 0.2
WHOLE_EVERY_S = 4.0
WHOLE_SEED = 1_000_000
ASKED_AGAIN = 3
"""Answers of a load whose samples are compared with those of the same request alone."""

Row = dict[str, Any]


@dataclass
class Plan:
    """Choices of a run.

    Attributes:
        seconds: during which requests arrive, at each load.
        capacity_seconds: likewise, at each number of streams at once.
        streams: number of requests at each load, in place of `seconds`; 0 for none.
        at_once: numbers of streams of the closed loop.
        loads: rates as shares of the capacity.
        burst: requests of a burst.
        seed: of texts and times.
        run: number of the run. Each run, case and load has texts of its own, since a server keeps
            the keys and values of prompts that it knows; they are the same for every server.
        quiet_ms: 95th percentile of first audio without a load, of the first server; None before it
            is measured.
        capacity: requests a second that count as load 1; None before it is measured.
        samples: compares answers to equal requests; None if the route takes no seed.
        records: requests and outcomes of every load.
    """

    seconds: float = 60.0
    capacity_seconds: float = 20.0
    streams: int = 0
    at_once: tuple[int, ...] = (4, 8, 16)
    loads: tuple[float, ...] = (0.5, 0.8, 1.0, 2.0)
    burst: int = 8
    seed: int = 0
    run: int = 0
    quiet_ms: float | None = None
    capacity: float | None = None
    samples: speech_load.Samples | None = field(default_factory=speech_load.Samples)
    records: list[dict] = field(default_factory=list)

    def seed_of(self, case: str, level: float = 0.0) -> str:
        """A seed for the texts and times of a case at a load."""
        return f"{self.seed} {self.run} {case} {level:g}"

    def seconds_at(self, rate: float) -> float:
        return self.streams / rate if self.streams else self.seconds


@asynccontextmanager
async def cost(server: Server, row: Row):
    """Adds the processor time of server and client during the block, in percent of one."""
    before = server.cpu_s()
    start_s = speech_load.now()
    async with speech_load.watched_client() as client:
        yield
    after, wall = server.cpu_s(), speech_load.now() - start_s
    known = before is not None and after is not None
    row["server cpu %"] = 100 * (after - before) / wall if known else None
    row["client cpu %"], row["client late ms"] = client.cpu_percent, client.late_ms


def gaps(streams: list[Stream]) -> Row:
    """The columns that every case has."""
    whole = speech_load.figures(streams, 0.0, 1.0)
    return {key: whole[key] for key in ("with gaps", "gap ms", "refused", "failed")}


async def warm_up(server: Server, plan: Plan) -> list[Stream]:
    """A short request, then eight at once."""
    first = await speak(server.target, Arrival(0.0, SHORT, 0, "short"))
    eight = list(islice(arrivals.requests(plan.seed_of("warm-up")), 8))
    return [first, *await speech_load.together(server.target, eight)]


async def quiet(server: Server, plan: Plan) -> list[Row]:
    """Requests of the same mix one after another."""
    row: Row = {}
    async with cost(server, row):
        streams, start_s = await speech_load.closed_loop(
            server.target, arrivals.requests(plan.seed_of("quiet")), 1, plan.capacity_seconds
        )
    found = speech_load.figures(streams, start_s, plan.capacity_seconds)
    keys = ("streams", *(key for key in found if key.startswith(("first", "audible"))), "goodput x")
    row = {**{key: found[key] for key in keys}, **gaps(streams), **row}
    await _note(server, plan, "quiet", None, streams, start_s, row)
    return [row]


async def capacity(server: Server, plan: Plan) -> list[Row]:
    """A closed loop at each number of streams at once."""
    rows, seconds = [], plan.capacity_seconds
    for at_once in plan.at_once:
        row: Row = {"at once": at_once}
        async with cost(server, row):
            requests = arrivals.requests(plan.seed_of("capacity", at_once))
            streams, start_s = await speech_load.closed_loop(
                server.target, requests, at_once, seconds
            )
        audio, rate = speech_load.throughput(streams, start_s, WARM_SHARE * seconds, seconds)
        first_ms = speech_load.milliseconds([s.first_audio_s for s in streams], 50)
        row = {
            "at once": at_once,
            "audio s/s": audio,
            "streams/s": rate,
            "audio s": audio / rate if rate else None,
            "first p50": first_ms,
            **gaps(streams),
            **row,
        }
        await _note(server, plan, "capacity", None, streams, start_s, row)
        rows.append(row)
    return rows


def capacity_of(rows: list[Row]) -> tuple[float, bool]:
    """Requests a second at the most audio without a gap; False if all levels had gaps."""
    rows = [row for row in rows if row["streams/s"]]
    if not rows:
        raise ValueError("no stream was complete, so there is no capacity")
    gapless = [row for row in rows if not row["with gaps"]]
    best = max(gapless or rows, key=lambda row: row["audio s/s"])
    return best["streams/s"], bool(gapless)


async def eight_and_one(server: Server, plan: Plan) -> list[Row]:
    """A short request while eight long streams run, against the same request alone."""
    short = Arrival(0.0, SHORT, 0, "short")
    quiet = [await speak(server.target, short) for _ in range(QUIET_REQUESTS)]
    quiet_ms = speech_load.milliseconds([s.first_audio_s for s in quiet], 50)
    others = arrivals.paragraphs(8, plan.seed_of("eight-and-one"))
    row: Row = {}
    async with cost(server, row):
        one, long = await speech_load.one_beside(server.target, others, short, BESIDE_PAUSE_S)
    first_ms = speech_load.milliseconds([one.first_audio_s], 50)
    limit_ms = quiet_ms and max(LEAST_LIMIT_MS, QUIET_TIMES * quiet_ms)
    row = {
        "quiet ms": quiet_ms,
        "first ms": first_ms,
        "limit ms": limit_ms,
        "long ones' first most": speech_load.milliseconds([s.first_audio_s for s in long], 100),
        **gaps([*quiet, one, *long]),
        **row,
    }
    await _note(server, plan, "eight-and-one", None, [one, *long], min(s.due_s for s in long), row)
    return [row]


async def eight_prompts(server: Server, plan: Plan) -> list[Row]:
    """First audio of eight long texts that come at once, in ascending order."""
    row: Row = {}
    async with cost(server, row):
        long = arrivals.paragraphs(8, plan.seed_of("eight-prompts"))
        streams = await speech_load.together(server.target, long)
    times = sorted(1e3 * s.first_audio_s for s in streams if s.first_audio_s is not None)
    padded = [*times, *[None] * (len(streams) - len(times))]
    firsts = {f"first {n} ms": ms for n, ms in enumerate(padded, 1)}
    row = {**firsts, **gaps(streams), **row}
    await _note(server, plan, "eight-prompts", None, streams, streams[0].due_s, row)
    return [row]


async def poisson(server: Server, plan: Plan) -> list[Row]:
    """Arrivals of a Poisson process at each load."""
    return await _loads(server, plan, "poisson", arrivals.poisson)


async def burst(server: Server, plan: Plan) -> list[Row]:
    """Bursts at the times of a Poisson process, at each load."""

    def times(rate: float, seconds: float, seed: str) -> list[float]:
        return arrivals.bursts(rate, seconds, seed, plan.burst)

    return await _loads(server, plan, "burst", times)


async def whole_under_load(server: Server, plan: Plan) -> list[Row]:
    """A whole answer every few seconds, beside Poisson arrivals of streams at each load."""
    rows = []
    for share in plan.loads:
        rate = share * _capacity(plan)
        seconds = plan.seconds_at(rate)
        seed = plan.seed_of("whole-under-load", share)
        streaming = arrivals.at_times(arrivals.poisson(rate, seconds, seed), seed)
        every = [n * WHOLE_EVERY_S for n in range(int(seconds / WHOLE_EVERY_S))]
        whole = [
            Arrival(at_s, a.text, WHOLE_SEED + a.seed, "whole", streaming=False)
            for at_s, a in zip(every, arrivals.paragraphs(len(every), seed), strict=True)
        ]
        row: Row = {}
        async with cost(server, row):
            streams, start_s = await speech_load.open_loop(server.target, [*streaming, *whole])
        answers = [s for s in streams if not s.arrival.streaming]
        waits = [s.end_s - s.due_s for s in answers if s.complete]
        row = {
            "load": share,
            "streams": len(streaming),
            "first p95": speech_load.figures(streams, start_s, seconds)["first p95"],
            "whole": len(answers),
            "whole complete": len(waits),
            "wait s p50": statistics.median(waits) if waits else None,
            "longest wait s": max(waits, default=None),
            **gaps(streams),
            **row,
        }
        await _note(server, plan, "whole-under-load", share, streams, start_s, row)
        rows.append(row)
    return rows


async def _loads(
    server: Server, plan: Plan, case: str, times: Callable[[float, float, str], list[float]]
) -> list[Row]:
    rows = []
    for share in plan.loads:
        rate = share * _capacity(plan)
        seconds = plan.seconds_at(rate)
        seed = plan.seed_of(case, share)
        requests = arrivals.at_times(times(rate, seconds, seed), seed)
        row: Row = {}
        async with cost(server, row):
            streams, start_s = await speech_load.open_loop(server.target, requests)
        found = speech_load.figures(streams, start_s, seconds)
        quiet_ms, p95_ms = plan.quiet_ms, found["first p95"]
        found["p95 / quiet"] = p95_ms / quiet_ms if p95_ms and quiet_ms else None
        row = {"load": share, "rate/s": rate, **found, **row}
        await _note(server, plan, case, share, streams, start_s, row)
        rows.append(row)
    return rows


def _capacity(plan: Plan) -> float:
    if plan.capacity is None:
        raise ValueError("loads need --capacity or the case capacity")
    return plan.capacity


async def _note(
    server: Server,
    plan: Plan,
    case: str,
    share: float | None,
    streams: list[Stream],
    start_s: float,
    row: Row,
) -> None:
    """Records the streams. Some are asked for again, alone, and must have the same samples."""
    row["differ"] = None
    if plan.samples:
        complete = [s.arrival for s in streams if s.complete]
        chosen = complete[:: max(len(complete) // ASKED_AGAIN, 1)][:ASKED_AGAIN]
        again = [await speak(server.target, arrival) for arrival in chosen]
        row["differ"] = plan.samples.differing([*streams, *again])
    row["problems"] = speech_load.problems(streams)
    requests = speech_load.recorded(streams, start_s)
    plan.records.append({"server": server.name, "case": case, "load": share, "requests": requests})


CASES: dict[str, Callable[[Server, Plan], Coroutine[Any, Any, list[Row]]]] = {
    "quiet": quiet,
    "capacity": capacity,
    "eight-and-one": eight_and_one,
    "eight-prompts": eight_prompts,
    "poisson": poisson,
    "burst": burst,
    "whole-under-load": whole_under_load,
}
