"""`GET /metrics`: the server's counters for Prometheus.

Each metric is declared once, with the function that reads its value where it is counted anyway.
The first scrape imports prometheus-client. `python -m vox_serve.metrics` prints the table of
docs/metrics.md.
"""

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request, Response

from vox_serve.deadlines import FRAME_S
from vox_serve.measures import Histogram
from vox_serve.runner import Runner

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric as Family

PREFIX = "voxkern_"


@dataclass(frozen=True, eq=False)
class Source:
    """The origin of the values.

    Attributes:
        runner: of the requests.
        description: the model, device and so on.
        responses: HTTP responses since the start, by status.
    """

    runner: Runner
    description: Mapping[str, Any]
    responses: Mapping[int, int]


Values = float | Mapping[str, float] | Histogram | Mapping[str, Histogram]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: without the prefix; a counter's ends with `_total`.
        help: what it is, with its unit.
        read: its value now, or one for each value of `label`. Any thread may call it.
        label: name of the label; "" for none.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    read: Callable[[Source], Values]
    label: str = ""


def _outcomes(source: Source) -> dict[str, float]:
    counts = source.runner.totals()
    rest = {name: counts[name] for name in ("cancelled", "refused", "stalled")}
    spoken = dict.fromkeys(("stop", "length", "context", "silence", "interrupted"), 0)
    return spoken | counts["finished"] | {"error": counts["failed"]} | rest


def _rows(source: Source) -> dict[str, float]:
    """Requests by what they do.

    A row moves when it gets a frame, and all rows of a step move at one time. So those that speak
    and did not move with the newest ones were left out of the newest step.
    """
    rows = source.runner.engine.rows
    speaking = [row for row in rows if row.num_frames]
    newest_s = max((row.moved_s for row in speaking), default=0.0)
    num_parked = sum(row.moved_s < newest_s for row in speaking)
    return {
        "waiting": source.runner.num_waiting,
        "starting": len(rows) - len(speaking),
        "live": len(speaking) - num_parked,
        "parked": num_parked,
    }


def _pages(source: Source) -> dict[str, float]:
    counts = source.runner.engine.cache_counts()
    held, cached = counts.get("pages_held", 0), counts.get("pages_cached", 0)
    return {"held": held, "cached": cached, "free": counts.get("pages", 0) - held - cached}


def _cached(name: str) -> Callable[[Source], float]:
    return lambda source: source.runner.engine.cache_counts().get(name, 0)


def _medians(source: Source) -> dict[str, float]:
    medians: Any = source.runner.engine.times.summary()["rows"]
    return {str(rows): ms / 1000 for rows, ms in medians.items()}


METRICS = (
    Metric(
        "requests_total",
        "counter",
        "requests by how they ended: a finish reason (see server.md), or error, cancelled (by the "
        "client), refused (429), stalled (not read); one that is spoken and then stalls counts as "
        "both",
        _outcomes,
        "outcome",
    ),
    Metric(
        "http_responses_total",
        "counter",
        "HTTP responses by status, of all paths",
        lambda s: {str(status): count for status, count in dict(s.responses).items()},
        "status",
    ),
    Metric(
        "time_to_first_audio_seconds",
        "histogram",
        "time from a streamed request, once it is read, to its first frame",
        lambda s: s.runner.measures.first_audio_s,
    ),
    Metric(
        "real_time_factor",
        "histogram",
        "time that speech took, from its first step to its last, over its length, by mode: stream "
        "or whole; streams that are ahead of their listeners give way to others",
        lambda s: {
            "stream": s.runner.measures.stream_factors,
            "whole": s.runner.measures.whole_factors,
        },
        "mode",
    ),
    Metric(
        "audio_seconds_total",
        "counter",
        "seconds of audio that were made",
        lambda s: s.runner.measures.num_frames * FRAME_S,
    ),
    Metric(
        "underruns_total",
        "counter",
        "frames of streams that were made after a listener in real time had played all before them",
        lambda s: s.runner.measures.num_underruns,
    ),
    Metric(
        "underrun_seconds_total",
        "counter",
        "seconds that listeners waited for these frames",
        lambda s: s.runner.measures.underruns_s,
    ),
    Metric(
        "step_seconds",
        "histogram",
        "time of a step of the engine",
        lambda s: s.runner.measures.steps_s,
    ),
    Metric(
        "step_median_seconds",
        "gauge",
        "median time of the newest steps without prompts, by their requests",
        _medians,
        "rows",
    ),
    Metric(
        "rows",
        "gauge",
        "requests by state: waiting (for a place), starting (no frame yet), live (in the newest "
        "step), parked (not in it: the listener has audio in hand, or leaves it unread)",
        _rows,
        "state",
    ),
    Metric(
        "max_rows",
        "gauge",
        "requests that may speak at the same time",
        lambda s: s.runner.engine.max_batch_size,
    ),
    Metric(
        "kv_pages",
        "gauge",
        "pages of the KV cache by state: held (by requests and the default context), cached (for "
        "later requests), free",
        _pages,
        "state",
    ),
    Metric(
        "prompt_positions_total",
        "counter",
        "positions of prompts that were looked up in the KV cache",
        _cached("positions_asked"),
    ),
    Metric(
        "prompt_positions_found_total",
        "counter",
        "those of them that were found",
        _cached("positions_found"),
    ),
    Metric(
        "positions_prefilled_ahead_total",
        "counter",
        "positions of conversations that were computed before a request came",
        _cached("positions_ahead"),
    ),
    Metric(
        "unread_bytes",
        "gauge",
        "audio that waits for its readers, in bytes",
        lambda s: s.runner.unread_bytes,
    ),
    Metric(
        "non_finite_total",
        "counter",
        "requests that ended because values were not finite",
        lambda s: s.runner.counts.non_finite,
    ),
    Metric(
        "recoveries_total",
        "counter",
        "failed steps after which the engine went on",
        lambda s: s.runner.counts.recoveries,
    ),
    Metric(
        "ready",
        "gauge",
        "1 while new requests are served, else 0",
        lambda s: int(s.runner.status[1] is None),
    ),
)

INFO = PREFIX + "info"
INFO_HELP = "1; its labels are the model, device, dtype, quantize and backend"
INFO_LABELS = ("model", "device", "dtype", "quantize", "backend")


class Collector:
    """Reads all metrics when Prometheus asks.

    Args:
        source: where from.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> "Iterator[Family]":
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
        )

        families: dict[str, Any] = {
            "counter": CounterMetricFamily,
            "gauge": GaugeMetricFamily,
            "histogram": HistogramMetricFamily,
        }
        for metric in METRICS:
            labels = [metric.label] if metric.label else []
            family = families[metric.kind](PREFIX + metric.name, metric.help, labels=labels)
            values: Any = metric.read(self._source)
            for key, value in (values if labels else {"": values}).items():
                given = [key] if labels else []
                if metric.kind == "histogram":
                    family.add_metric(given, *_cumulative(value))
                else:
                    family.add_metric(given, value)
            yield family
        description = self._source.description
        info = {name: str(description.get(name, "")) for name in INFO_LABELS}
        yield InfoMetricFamily(INFO.removesuffix("_info"), INFO_HELP, info)


def _cumulative(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Prometheus's buckets, which include all below, and the sum."""
    total, buckets = 0, []
    bounds = [*map(float, histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, list(histogram.counts), strict=True):
        total += count
        buckets.append((str(bound), float(total)))
    return buckets, histogram.sum


def make_registry(source: Source) -> "CollectorRegistry":
    """A registry of this server's metrics and of the process's own (`process_...`)."""
    from prometheus_client import CollectorRegistry, ProcessCollector

    registry = CollectorRegistry()
    registry.register(Collector(source))
    ProcessCollector(registry=registry)
    return registry


def add_metrics_route(app: FastAPI, source: Source) -> None:
    """Add `GET /metrics`."""

    registry = functools.cache(make_registry)

    def render(accept: str) -> tuple[bytes, str]:
        from prometheus_client.exposition import choose_encoder

        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # it cannot read the header's version
            encode, content_type = choose_encoder("")
        return encode(registry(source)), content_type

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics(request: Request) -> Response:
        """Counters and histograms for Prometheus."""
        # In another thread: the first call imports a package.
        body, kind = await asyncio.to_thread(render, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": kind})


def markdown_table() -> str:
    """All metrics as one Markdown table."""
    lines = ["| metric | type | label | meaning |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        label = f"`{metric.label}`" if metric.label else ""
        lines.append(f"| `{PREFIX}{metric.name}` | {metric.kind} | {label} | {metric.help} |")
    lines.append(f"| `{INFO}` | gauge | | {INFO_HELP} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
