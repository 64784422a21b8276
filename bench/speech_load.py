"""Loads on a speech server, open and closed, and the figures of what listeners heard."""

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from arrivals import Arrival
from playback import audio_between, percentile
from speech_client import Stream, Target, begin, speak

TICK_S = 0.02


@dataclass
class Client:
    """The cost and the precision of the measuring client.

    Attributes:
        cpu_percent: processor time of this process, in percent of one processor.
        late_ms: 99th percentile of how late the event loop was: an error of every time measured.
    """

    cpu_percent: float = 0.0
    late_ms: float = 0.0


def now() -> float:
    """Time of the running event loop's clock, in seconds."""
    return asyncio.get_running_loop().time()


@contextlib.asynccontextmanager
async def watched_client() -> AsyncIterator[Client]:
    """Measures this process until the end of the block, which fills the figures in."""
    loop, client, late = asyncio.get_running_loop(), Client(), [0.0]

    async def tick() -> None:
        due_s = loop.time() + TICK_S
        while True:
            await asyncio.sleep(due_s - loop.time())
            late.append(loop.time() - due_s)
            due_s = loop.time() + TICK_S

    ticking = loop.create_task(tick())
    start, cpu = time.perf_counter(), time.process_time()
    try:
        yield client
    finally:
        ticking.cancel()
        wall = max(time.perf_counter() - start, 1e-9)
        client.cpu_percent = 100 * (time.process_time() - cpu) / wall
        client.late_ms = 1e3 * (percentile(late, 99) or 0.0)


async def open_loop(target: Target, arrivals: Sequence[Arrival]) -> tuple[list[Stream], float]:
    """Send each request at its time, whatever became of the earlier ones; wait for all to end.

    Returns:
        The streams, and the time of the load's start on the event loop's clock.
    """
    start_s = now() + 0.05

    async def one(arrival: Arrival) -> Stream:
        due_s = start_s + arrival.at_s
        await asyncio.sleep(due_s - now())
        return await speak(target, arrival, due_s)

    return list(await asyncio.gather(*map(one, arrivals))), start_s


async def closed_loop(
    target: Target, requests: Iterator[Arrival], at_once: int, seconds: float
) -> tuple[list[Stream], float]:
    """Keep a number of requests busy for so long, each followed by the next; see `open_loop`."""
    loop = asyncio.get_running_loop()
    start_s, streams = loop.time(), []

    async def slot() -> None:
        while loop.time() < start_s + seconds:
            streams.append(await speak(target, next(requests)))
            if not streams[-1].complete:
                await asyncio.sleep(0.1)  # a server that refuses is not flooded

    await asyncio.gather(*(slot() for _ in range(at_once)))
    return streams, start_s


async def together(target: Target, arrivals: Iterable[Arrival]) -> list[Stream]:
    """Send requests at once; wait for all to end."""
    return list(await asyncio.gather(*(speak(target, arrival) for arrival in arrivals)))


async def one_beside(
    target: Target, others: Sequence[Arrival], one: Arrival, pause_s: float
) -> tuple[Stream, list[Stream]]:
    """Send `one` a while after all others, sent together, have begun to sound.

    Returns:
        Its stream and the others', all of them ended.
    """
    begun = [begin(target, arrival) for arrival in others]
    for stream, _ in begun:
        await stream.has_begun.wait()
    await asyncio.sleep(pause_s)
    stream = await speak(target, one)
    await asyncio.gather(*(task for _, task in begun))
    return stream, [other for other, _ in begun]


def milliseconds(times: Iterable[float | None], percent: float) -> float | None:
    """A percentile in ms of those times that are not None."""
    value = percentile([t for t in times if t is not None], percent)
    return None if value is None else 1e3 * value


def figures(streams: Sequence[Stream], start_s: float, seconds: float) -> dict[str, Any]:
    """Figures of a load.

    Args:
        streams: those of streaming requests count as heard; a whole answer cannot have a gap.
        start_s: start of the load.
        seconds: time during which requests arrived. Goodput is the audio of gapless streams that
            came in this time; a stream that came in part counts in part.
    """
    heard = [s for s in streams if s.complete and s.arrival.streaming]
    played = [s.playback for s in heard]
    gapless = [(s, p) for s, p in zip(heard, played, strict=True) if not p.underruns]
    shares = [audio_between(s.chunks, start_s, start_s + seconds) for s, _ in gapless]
    refused = [s.answer_s - s.sent_s for s in streams if s.refused and s.answer_s is not None]
    first = [s.first_audio_s for s in heard]
    return {
        "streams": len(streams),
        "complete": sum(s.complete for s in streams),
        "first p50": milliseconds(first, 50),
        "first p95": milliseconds(first, 95),
        "first p99": milliseconds(first, 99),
        "first most": milliseconds(first, 100),
        "audible p50": milliseconds([s.audible_s for s in heard], 50),
        "audible p95": milliseconds([s.audible_s for s in heard], 95),
        "with gaps": sum(p.underruns > 0 for p in played),
        "gaps": sum(p.underruns for p in played),
        "gap ms": 1e3 * sum(p.gap_s for p in played),
        "longest gap ms": 1e3 * max((p.longest_gap_s for p in played), default=0.0),
        "goodput/s": sum(x / p.audio_s for x, (_, p) in zip(shares, gapless, strict=True))
        / seconds,
        "goodput x": sum(shares) / seconds,
        "refused": len(refused),
        "refused p95": milliseconds(refused, 95),
        "refused most": milliseconds(refused, 100),
        "failed": sum(s.problem is not None for s in streams),
    }


def throughput(
    streams: Sequence[Stream], start_s: float, warm_s: float, seconds: float
) -> tuple[float, float]:
    """Rates of a closed loop from `warm_s` to `seconds` after its start, gaps or none.

    Returns:
        Seconds of audio a second, and requests a second of the same mean length.
    """
    complete = [s for s in streams if s.complete]
    if not complete:
        return 0.0, 0.0
    came_s = sum(audio_between(s.chunks, start_s + warm_s, start_s + seconds) for s in streams)
    rate = came_s / (seconds - warm_s)
    return rate, rate / statistics.mean(s.playback.audio_s for s in complete)


def problems(streams: Iterable[Stream]) -> list[str]:
    """Reasons of failed requests with their numbers, the most frequent first."""
    counts = Counter(s.problem for s in streams if s.problem)
    return [f"{number} x {problem}" for problem, number in counts.most_common()]


class Samples:
    """Compares the speech of equal requests: the same text and seed give the same samples."""

    def __init__(self) -> None:
        self._digests: dict[tuple[str, int], str] = {}

    def differing(self, streams: Iterable[Stream]) -> int:
        """Number of complete answers that differ from the first one to an equal request."""
        return sum(
            self._digests.setdefault((s.arrival.text, s.arrival.seed), s.digest) != s.digest
            for s in streams
            if s.complete
        )


def recorded(streams: Iterable[Stream], start_s: float, frame_s: float = 0.08) -> list[dict]:
    """Requests and outcomes in the order of arrival, for bench/simulate.py; times in seconds.

    `frames` is None where the speech did not come in full; see `fill_in_frames`.
    """
    return [
        {
            "at_s": round(s.due_s - start_s, 6),
            "text": s.arrival.text,
            "seed": s.arrival.seed,
            "kind": s.arrival.kind,
            "streaming": s.arrival.streaming,
            "frames": round(s.playback.audio_s / frame_s) if s.complete else None,
            "status": s.status,
            "first_audio_s": s.first_audio_s,
            "end_s": round(s.end_s - s.due_s, 6),
            "underruns": s.playback.underruns,
            "gap_s": s.playback.gap_s,
        }
        for s in sorted(streams, key=lambda s: s.due_s)
    ]


def fill_in_frames(requests: list[dict]) -> None:
    """Gives recorded requests whose speech did not come in full the frames that it would have had.

    They have those of an equal request where one was complete, else the mean number for so many
    characters. `frames_from` says which: "speech", "equal request" or "length"; without any
    complete request it is "unknown".
    """
    complete = [r for r in requests if r["frames"] is not None]
    known = {(r["text"], r["seed"]): r["frames"] for r in complete}
    chars = sum(len(r["text"]) for r in complete)
    per_char = sum(r["frames"] for r in complete) / chars if chars else None
    for request in requests:
        if request["frames"] is not None:
            request["frames_from"] = "speech"
        elif found := known.get((request["text"], request["seed"])):
            request["frames"], request["frames_from"] = found, "equal request"
        elif per_char:
            request["frames"] = max(round(per_char * len(request["text"])), 1)
            request["frames_from"] = "length"
        else:
            request["frames_from"] = "unknown"
