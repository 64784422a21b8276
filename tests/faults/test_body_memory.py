"""Bodies that are being sent are bounded together, and their senders pay for it."""

import contextlib
import socket

import pytest
from fastapi import HTTPException

from fake_engine import FakeEngine
from live_server import LiveServer, wait_until
from vox_serve.http_io import BodyMemory


def test_the_client_that_holds_the_most_is_refused():
    bodies = BodyMemory(100)
    with contextlib.ExitStack() as open_bodies:
        counts = [open_bodies.enter_context(bodies.hold(client)) for client in ("a", "a", "b")]
        counts[0](50)
        counts[1](40)
        counts[2](30)  # beyond the limit, but a holds more
        with pytest.raises(HTTPException) as refused:
            counts[1](1)
        assert refused.value.status_code == 429
        assert refused.value.headers == {"Retry-After": "1"}
    assert (bodies.num_bytes, bodies._held) == (0, {})


def test_a_body_that_ends_makes_room():
    bodies = BodyMemory(100)
    for _ in range(3):
        with bodies.hold("a") as count:
            count(100)


def test_half_sent_bodies_do_not_fill_the_memory(monkeypatch):
    """Forty bodies of which the last byte does not come, where eight have room."""
    size = 262_144
    monkeypatch.setattr("vox_serve.api.MAX_BODY_MEMORY_BYTES", 8 * size)
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size
    with LiveServer(FakeEngine(), body_timeout_s=30) as server:
        open_sockets = []
        for _ in range(40):
            raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            raw.sendall(head + b" " * (size - 1))
            open_sockets.append(raw)

        def num_refused() -> int:
            refused = 0
            for raw in open_sockets:
                raw.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    refused += raw.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 429"
            return refused

        wait_until(lambda: num_refused() >= 32)
        for raw in open_sockets:
            raw.close()
        wait_until(lambda: server.post(text="hello").status == 200)
