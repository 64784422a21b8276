"""Clients that send one refused request after the other, and those beside them."""

import http.client
import json
import socket

import pytest

from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine, expected_pcm
from live_server import LiveServer, wait_until
from vox_serve import client_pace, error_pace
from vox_serve.audio import wav_file

BAD = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
NO_HTTP = b"\x16\x03\x01\r\n\r\n"
NEVER = {"max_errors_per_s": 0.01}
OTHER = "127.0.0.2"


@pytest.fixture
def impatient(monkeypatch):
    """Two errors at once; the third waits for longer than the test."""
    monkeypatch.setattr(error_pace, "BURST", 2)
    monkeypatch.setattr(client_pace, "MAX_DELAY_S", 20 * TIMEOUT_S)


def send(server: LiveServer, sent: bytes, own: str = "127.0.0.1") -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S, (own, 0))
    raw.sendall(sent)
    return raw


def status_of(raw: socket.socket) -> int:
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    assert json.loads(answer.read())["detail"]
    return answer.status


def waiting(server: LiveServer) -> int:
    """Errors that wait for their turn."""
    connections = list(server.server.server_state.connections)
    return sum(connection.is_waiting_for_turn for connection in connections)


def assert_speaks(server: LiveServer) -> None:
    assert server.post(text="hello").read() == wav_file(expected_pcm("hello", 3))


@pytest.mark.parametrize(("sent", "status"), [(BAD, 404), (NO_HTTP, 400)])
def test_an_error_that_waits_delays_nothing_else(sent, status, impatient):
    with LiveServer(FakeEngine(), **NEVER) as server:
        for _ in range(2):
            assert status_of(send(server, sent)) == status
        held = [send(server, sent) for _ in range(3)]
        wait_until(lambda: waiting(server) == 3)
        assert_speaks(server)  # the same client's correct requests
        assert status_of(send(server, sent, OTHER)) == status
        assert waiting(server) == 3
    assert [status_of(raw) for raw in held] == [status] * 3  # the shutdown does not wait


@pytest.mark.parametrize("sent", [BAD, NO_HTTP])
def test_a_client_that_leaves_while_its_error_waits_leaves_nothing(sent, impatient):
    with LiveServer(FakeEngine(), **NEVER) as server:
        for _ in range(5):
            send(server, sent).close()
        state = server.server.server_state
        wait_until(lambda: not state.connections)
        for raw in [send(server, sent) for _ in range(3)]:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raw.close()
        wait_until(lambda: not state.connections)
        assert_speaks(server)
    assert not state.connections
    assert not state.tasks


def test_a_request_given_up_is_no_error_and_leaves_no_task(impatient):
    with LiveServer(FakeEngine(num_frames=ENDLESS, step_s=0.001), **NEVER) as server:
        state = server.server.server_state
        for _ in range(4):
            raw = server.post_raw(text="long", max_frames=2000)
            wait_until(lambda: server.runner.count_jobs()[0] == 1)
            raw.close()
            wait_until(lambda: not state.tasks)
        assert status_of(send(server, BAD)) == 404


@pytest.mark.parametrize("sent", [BAD, NO_HTTP])
def test_an_error_that_waits_gives_way_to_a_new_connection(sent, impatient):
    with LiveServer(FakeEngine(), max_connections=4, **NEVER) as server:
        for _ in range(2):
            status_of(send(server, sent))
        held = []
        for _ in range(4):
            held.append(send(server, sent))
            wait_until(lambda: waiting(server) == len(held))
        assert_speaks(server)
        assert waiting(server) == 3


def test_refusals_of_a_full_queue_wait_too(impatient):
    engine = FakeEngine(num_frames=10**6, max_batch_size=1, step_s=0.001)
    with LiveServer(engine, max_queue_size=0, **NEVER) as server:
        speaking = server.post_raw(text="long", streaming=True, max_frames=2000)
        assert speaking.recv(8)
        for _ in range(2):
            assert server.post(text="too much").status == 429
        held = server.post_raw(text="too much")
        wait_until(lambda: waiting(server) == 1)
        assert speaking.recv(4096)
        speaking.close()
    answer = http.client.HTTPResponse(held)
    answer.begin()
    assert answer.status == 429
    assert int(answer.getheader("retry-after")) >= 1
