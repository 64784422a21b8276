"""`/metrics`: values, names and documentation."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics import parser as open_metrics_parser
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import ENDLESS, FakeEngine
from live_server import LiveServer, wait_until
from vox_serve.api import create_app
from vox_serve.config import Config
from vox_serve.deadlines import FRAME_S, Row
from vox_serve.measures import Histogram, Measures, Playback
from vox_serve.metrics import INFO, METRICS, PREFIX, markdown_table
from vox_serve.runner import Runner

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
DESCRIPTION = {"model": 'a "model"', "device": "cpu", "max_batch_size": 2}


def serve(engine: FakeEngine, **settings) -> TestClient:
    config = Config(**settings)
    runner = Runner.for_config(engine, config)
    return TestClient(create_app(runner, config, DESCRIPTION), raise_server_exceptions=False)


def parse(text: str) -> dict:
    """Values by name and label values, such as `("voxkern_rows", "live")`."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(client) -> dict:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return parse(answer.text)


def test_values_after_known_requests():
    engine = FakeEngine(num_frames=3)
    with serve(engine) as client:
        assert client.post("/generate", json={"text": "a"}).status_code == 200
        assert client.post("/generate", json={"text": "b", "streaming": True}).status_code == 200
        short = {"text": "c", "max_frames": 2}
        assert client.post("/generate", json=short).status_code == 200
        assert client.post("/generate", json={"text": ""}).status_code == 422
        assert client.post("/generate", json={"text": "nan"}).status_code == 500
        seen = scrape(client)
    requests = {key[1]: n for key, n in seen.items() if key[0] == f"{PREFIX}requests_total" and n}
    assert requests == {"stop": 2, "length": 1, "error": 1}
    responses = {key[1]: n for key, n in seen.items() if key[0] == f"{PREFIX}http_responses_total"}
    assert responses == {"200": 3, "422": 1, "500": 1}
    expected = {
        "audio_seconds_total": 10 * FRAME_S,
        "time_to_first_audio_seconds_count": 1,
        "step_seconds_count": engine.num_steps,
        "non_finite_total": 1,
        "recoveries_total": 0,
        "underruns_total": 0,
        "unread_bytes": 0,
        "max_rows": 2,
        "ready": 1,
    }
    assert {name: seen[PREFIX + name,] for name in expected} == pytest.approx(expected)
    factors = f"{PREFIX}real_time_factor_count"
    assert (seen[factors, "stream"], seen[factors, "whole"]) == (1, 2)
    assert next(key for key in seen if key[0] == INFO)[1:] == ("", "cpu", "", 'a "model"', "")
    assert seen["process_resident_memory_bytes",] > 0


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
def test_an_accept_header_that_is_no_version(kind):
    with serve(FakeEngine()) as client:
        answer = client.get("/metrics", headers={"Accept": f"{kind};version=new"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert (f"{PREFIX}ready",) in parse(answer.text)


def test_requests_that_are_refused_or_given_up():
    engine = FakeEngine(num_frames=ENDLESS, max_batch_size=1, step_s=0.002)
    with LiveServer(engine, max_queue_size=1, policy="fifo") as server:
        client = TestClient(server.app)
        first, second = (server.post_raw(text=text) for text in ("first", "second"))
        wait_until(lambda: server.runner.count_jobs() == (1, 1))
        assert server.post(text="third").status == 429
        assert scrape(client)[f"{PREFIX}rows", "waiting"] == 1
        first.close(), second.close()
        wait_until(lambda: server.runner.count_jobs() == (0, 0))
        seen = scrape(client)
    outcomes = {name: seen[f"{PREFIX}requests_total", name] for name in ("refused", "cancelled")}
    assert outcomes == {"refused": 1, "cancelled": 2}


def test_rows_by_state():
    engine = FakeEngine()
    engine.rows = [
        Row("new", 5.0),
        Row("live", 7.0, num_frames=2),
        Row("live too", 7.0, num_frames=9),
        Row("parked", 6.0, num_frames=4),
    ]
    with serve(engine) as client:
        seen = scrape(client)
    states = {key[1]: count for key, count in seen.items() if key[0] == f"{PREFIX}rows"}
    assert states == {"waiting": 0, "starting": 1, "live": 2, "parked": 1}


def test_the_cache_and_the_learnt_times():
    engine = FakeEngine()
    counts = {"pages": 10, "pages_held": 3, "pages_cached": 2}
    engine.cache_counts = lambda: {
        **counts,
        "positions_asked": 70,
        "positions_found": 40,
        "positions_ahead": 30,
    }
    engine.times.observe(1, 0, 0.25)
    engine.times.observe(4, 0, 0.5)
    with serve(engine) as client:
        seen = scrape(client)
    pages = {key[1]: count for key, count in seen.items() if key[0] == f"{PREFIX}kv_pages"}
    assert pages == {"held": 3, "cached": 2, "free": 5}
    assert seen[f"{PREFIX}prompt_positions_total",] == 70
    assert seen[f"{PREFIX}prompt_positions_found_total",] == 40
    assert seen[f"{PREFIX}positions_prefilled_ahead_total",] == 30
    assert seen[f"{PREFIX}step_median_seconds", "4"] == 0.5


def test_every_app_has_its_own_counts():
    with serve(FakeEngine()) as one, serve(FakeEngine()) as other:
        one.post("/generate", json={"text": "a"})
        assert scrape(one)[f"{PREFIX}audio_seconds_total",] > 0
        assert scrape(other)[f"{PREFIX}audio_seconds_total",] == 0


def test_a_server_that_cannot_serve_is_not_ready():
    with serve(FakeEngine()) as client:
        client.app.state.conversations._runner.draining = True
        assert scrape(client)[f"{PREFIX}ready",] == 0


def test_metrics_need_the_key():
    with serve(FakeEngine(), api_key="secret") as client:
        assert client.get("/metrics").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert client.get("/metrics", headers=headers).status_code == 200


def test_both_formats_of_prometheus():
    with serve(FakeEngine()) as client:
        plain = client.get("/metrics")
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        open_metrics = client.get("/metrics", headers=accept)
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    families = open_metrics_parser.text_string_to_metric_families(open_metrics.text)
    assert f"{PREFIX}requests" in [family.name for family in families]


def test_the_documentation_has_every_metric():
    assert markdown_table() in PAGE.read_text()
    with serve(FakeEngine()) as client:
        text = client.get("/metrics").text
    found = {family.name for family in text_string_to_metric_families(text)}
    ours = {name for name in found if name.startswith(PREFIX)}
    assert ours == {PREFIX + m.name.removesuffix("_total") for m in METRICS} | {INFO}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric):
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not metric.name.endswith(("_ms", "_s", "_count", "_sum", "_bucket"))
    assert metric.help


def test_a_histogram_counts_by_upper_bound():
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 2.5, 3.0):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 2]
    assert histogram.sum == 8.5


def test_a_listener_waits_for_late_frames_only():
    playback = Playback()
    arrivals_s = [10.0, 10.01, 10.15, 10.5, 10.57, 10.66]
    late_s = [playback.arrive(now_s) for now_s in arrivals_s]
    # Played at 10, 10.08 and 10.16; the fourth was due at 10.24 and is played at 10.5; then 10.58
    # and 10.66.
    assert late_s == pytest.approx([0, 0, 0, 0.26, 0, 0])


def test_measures_of_speech():
    measures = Measures()
    listener = Playback()
    for now_s in (1.0, 1.05, 2.0):
        measures.frame(listener, now_s)
    measures.frame(None, 3.0)
    assert (measures.num_frames, measures.num_underruns) == (4, 1)
    assert measures.underruns_s == pytest.approx(2.0 - 1.16)
    measures.spoken(2.0, 50, streaming=True)
    measures.spoken(1.0, 0, streaming=True)
    assert measures.stream_factors.sum == pytest.approx(0.5)
    assert sum(measures.whole_factors.counts) == 0


def test_a_listener_of_fast_speech_waits_sooner():
    playback = Playback(frame_s=0.04)
    assert [playback.arrive(now_s) for now_s in (1.0, 1.03, 1.1)] == pytest.approx([0, 0, 0.02])
