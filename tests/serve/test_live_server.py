"""Behaviour that needs real sockets: streaming, clients that disconnect, shutdown."""

import http.client
import json
import logging
import socket
import time

import numpy as np
import pytest
import uvicorn

from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine, expected_pcm
from live_server import LiveServer, wait_until
from vox_serve import job as job_module
from vox_serve import launch
from vox_serve.audio import pcm16, wav_file, wav_header
from vox_serve.ending import FADE_SAMPLES, fade_tail


class Kept(logging.Handler):
    """Collects messages."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def errors(monkeypatch):
    """The messages that the server logs as errors."""
    kept = Kept()
    configure = uvicorn.Config.configure_logging

    def configure_and_keep(config: uvicorn.Config) -> None:
        configure(config)  # removes every handler of uvicorn's loggers
        logging.getLogger("uvicorn.error").addHandler(kept)

    monkeypatch.setattr(uvicorn.Config, "configure_logging", configure_and_keep)
    logging.getLogger("vox_serve").addHandler(kept)
    yield kept.messages
    for name in ("uvicorn.error", "vox_serve"):
        logging.getLogger(name).removeHandler(kept)


def test_the_first_chunk_is_the_header_and_the_first_frame():
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)
    with LiveServer(engine) as server:
        answer = server.post(text="hello", streaming=True)
        assert answer.getheader("transfer-encoding") == "chunked"
        # The utterance never ends, so this chunk was sent during generation.
        assert answer.read1(1 << 20) == wav_header(None) + expected_pcm("hello", 1)
        answer.close()
        assert engine.saw_abort.wait(TIMEOUT_S)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_disconnect_aborts_the_request(streaming, errors):
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)
    with LiveServer(engine) as server:
        raw = server.post_raw(text="hello", streaming=streaming)
        wait_until(lambda: server.runner.count_jobs() == (1, 0))
        raw.close()
        assert engine.saw_abort.wait(TIMEOUT_S)
        assert not engine.has_work
        assert server.runner.count_jobs() == (0, 0)
        assert server.post(text="next", max_frames=1).read() == wav_file(
            expected_pcm("next", 1, cut=True)
        )
    assert errors == []


def test_a_client_may_disconnect_while_sending_its_body(errors):
    engine = FakeEngine()
    with LiveServer(engine) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S) as raw:
            raw.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert server.post(text="next").read() == wav_file(expected_pcm("next", 3))
    assert errors == []
    assert [request.text for request in engine.requests] == ["next"]


def test_a_disconnect_removes_a_queued_request():
    engine = FakeEngine(num_frames=ENDLESS, max_batch_size=1, step_s=0.002)
    with LiveServer(engine, max_queue_size=1) as server:
        first = server.post_raw(text="first")
        wait_until(lambda: server.runner.count_jobs() == (1, 0))
        second = server.post_raw(text="second")
        wait_until(lambda: server.runner.count_jobs() == (1, 1))

        full = server.post(text="third")
        assert full.status == 429
        assert full.getheader("retry-after") == "2"  # no utterance has ended: 1 s each is assumed
        assert "2 requests" in json.loads(full.read())["detail"]

        second.close()
        wait_until(lambda: server.runner.count_jobs() == (1, 0))
        first.close()
        wait_until(lambda: not engine.has_work)
    assert [request.text for request in engine.requests] == ["first"]


def test_a_slow_reader_does_not_stall_the_others():
    engine = FakeEngine(num_frames=ENDLESS)
    with LiveServer(engine, max_frames=2048) as server:
        slow = server.post(text="slow", streaming=True)  # 7.9 MB, more than the sockets buffer
        others = [server.post(text=f"{i}", max_frames=2).read() for i in range(5)]
        assert others == [wav_file(expected_pcm(f"{i}", 2, cut=True)) for i in range(5)]
        assert slow.read() == wav_header(None) + expected_pcm("slow", 2048, cut=True)


def test_a_failing_engine_cuts_the_stream(errors):
    with LiveServer(FakeEngine(num_frames=ENDLESS, fail_at_step=4)) as server:
        answer = server.post(text="hello", streaming=True)
        assert answer.status == 200
        with pytest.raises(http.client.IncompleteRead) as cut:
            answer.read()
        samples = np.frombuffer(cut.value.partial[44:], "<i2")
        spoken = np.frombuffer(expected_pcm("hello", 3), "<i2")
        spoken, tail = spoken[: len(samples) - FADE_SAMPLES], samples[-FADE_SAMPLES:]
        np.testing.assert_array_equal(samples[:-FADE_SAMPLES], spoken)
        np.testing.assert_array_equal(tail, pcm16(fade_tail(spoken[-1] / 32768)))
    assert sum("the engine failed in a step" in message for message in errors) == 1
    assert sum("was cut: the request failed: internal error" in m for m in errors) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_stopping_the_server_ends_live_requests(streaming):
    with LiveServer(FakeEngine(num_frames=ENDLESS, step_s=0.002)) as server:
        raw = server.post_raw(text="hello", streaming=streaming)
        wait_until(lambda: server.runner.count_jobs() == (1, 0))
        server.stop()
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
        if streaming:
            assert answer.startswith(b"HTTP/1.1 200")
            assert not answer.endswith(b"0\r\n\r\n")
        else:
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"shutting down" in answer
        raw.close()


def test_a_large_body_is_refused_before_it_is_read_to_its_end():
    with LiveServer(FakeEngine()) as server:
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S)
        raw.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n{")
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")
        raw.close()

        raw = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S)
        raw.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            raw.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")
        raw.close()


@pytest.mark.parametrize("stalled_in", ["the body", "the answer"])
def test_a_stalled_client_does_not_delay_shutdown(stalled_in, monkeypatch, errors):
    monkeypatch.setattr(launch, "SHUTDOWN_GRACE_S", 0.2)
    monkeypatch.setattr(job_module, "MAX_AHEAD_BYTES", 2**30)
    with LiveServer(FakeEngine(num_frames=ENDLESS), max_frames=2048) as server:
        if stalled_in == "the body":
            raw = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S)
            raw.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        else:
            raw = server.post_raw(text="hello", streaming=True)
            # Fully generated, partly sent.
            wait_until(lambda: [job.ended for job in server.runner._jobs.values()] == [True])
        wait_until(lambda: server.server.server_state.tasks)
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < TIMEOUT_S / 3
        raw.close()
    assert errors == []
