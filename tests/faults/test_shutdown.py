"""The end of the server's process: signals, drain, exit codes, restart."""

import http.client
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fake_engine import TIMEOUT_S, expected_pcm
from process_server import ProcessServer
from vox_serve.audio import wav_header

pytestmark = pytest.mark.slow  # each test starts a process

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture
def log(tmp_path):
    """The server's log, which shows no traceback in the end."""
    path = tmp_path / "stderr"
    yield path
    assert "Traceback" not in path.read_text()


@SIGNALS
def test_a_signal_lets_speech_finish_and_refuses_the_rest(number, log):
    engine = "num_frames=150, max_batch_size=1, step_s=0.02"
    with ProcessServer(log, engine) as server, ThreadPoolExecutor() as pool:
        live = server.speak("live", streaming=True, max_frames=2000)
        waiting = pool.submit(server.speak, "waiting")
        while server.request("GET", "/health").read().find(b'"waiting_requests": 1') < 0:
            time.sleep(0.01)
        server.signal(number)
        refused = waiting.result(TIMEOUT_S)
        assert refused.status == 503
        assert int(refused.getheader("retry-after")) >= 1
        assert "shutting down" in json.loads(refused.read())["detail"]
        assert (server.status("/health/live"), server.status("/health/ready")) == (200, 503)
        late = server.speak("late")
        assert (late.status, late.getheader("retry-after") is None) == (503, False)
        assert live.read() == wav_header(None) + expected_pcm("live", 150)
        assert server.wait() == 0


@SIGNALS
def test_a_second_signal_ends_at_once(number, log):
    with ProcessServer(log, "num_frames=ENDLESS, step_s=0.02") as server:
        live = server.speak("live", streaming=True, max_frames=2000)
        server.signal(number)
        while server.status("/health/ready") != 503:
            time.sleep(0.01)
        start = time.monotonic()
        server.signal(number)
        assert server.wait() == 130
        assert time.monotonic() - start < TIMEOUT_S / 3
        with pytest.raises((http.client.HTTPException, OSError)):
            live.read()


def test_what_outlasts_the_drain_is_cut(log):
    engine = "num_frames=ENDLESS, step_s=0.02, max_batch_size=2"
    with ProcessServer(log, engine, flags=["--drain_s=0.3"]) as server, ThreadPoolExecutor() as p:
        live = server.speak("live", streaming=True, max_frames=2000)
        whole = p.submit(server.speak, "whole", max_frames=2000)
        while server.request("GET", "/health").read().find(b'"live_requests": 2') < 0:
            time.sleep(0.01)
        server.signal(signal.SIGTERM)
        with pytest.raises(http.client.IncompleteRead):
            live.read()
        assert whole.result(TIMEOUT_S).status == 503
        assert server.wait() == 0


def test_a_signal_waits_for_no_text_that_is_being_tokenized(log):
    hang = "import time; engine.prepare = lambda request: time.sleep(1000)"
    with ProcessServer(log, after=hang) as server, ThreadPoolExecutor() as pool:
        waiting = pool.submit(server.speak, "endless")
        while server.request("GET", "/health").read().find(b'"waiting_requests": 1') < 0:
            time.sleep(0.01)
        server.signal(signal.SIGTERM)
        assert waiting.result(TIMEOUT_S).status == 503
        assert server.wait() == 0


def test_a_broken_device_ends_the_process_with_its_own_code(tmp_path):
    fault = "\n".join([
        "def fault(): raise RuntimeError('CUDA error: an illegal memory access')",
        "engine.fault = fault",
    ])  # fmt: skip
    with ProcessServer(tmp_path / "log", after=fault) as server:
        answer = server.speak("a")
        assert answer.status == 503
        assert json.loads(answer.read()) == {"detail": "the engine failed"}
        assert server.wait() == 70
    assert (tmp_path / "log").read_text().count("Traceback") == 1


def test_a_killed_server_starts_again_on_its_port(log):
    with ProcessServer(log, "num_frames=ENDLESS, step_s=0.02") as server:
        live = server.speak("live", streaming=True, max_frames=2000)
        server.signal(signal.SIGKILL)
        server.wait()
        with pytest.raises((http.client.HTTPException, OSError)):
            live.read()
        with ProcessServer(log.with_name("again"), "num_frames=1", port=server.port) as again:
            assert again.port == server.port
            assert again.speak("a").read()[44:] == expected_pcm("a", 1)


def test_an_idle_server_ends_at_once(log):
    with ProcessServer(log) as server:
        server.speak("a").read()
        start = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - start < TIMEOUT_S / 3
