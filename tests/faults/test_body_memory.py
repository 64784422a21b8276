"""Bodies that are being sent are bounded together, and their senders pay for it."""

import asyncio
import contextlib
import gc
import socket
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient

from fake_engine import TIMEOUT_S, FakeEngine
from http_testing import assert_refused
from live_server import LiveServer, wait_until
from vox_serve.api import create_app
from vox_serve.config import Config
from vox_serve.context_field import parse_context
from vox_serve.context_segment import ContextError
from vox_serve.http_io import BodyMemory
from vox_serve.runner import Runner
from vox_serve.voice_service import VoiceService


def serve(engine: FakeEngine) -> TestClient:
    config = Config()
    return TestClient(create_app(Runner.for_config(engine, config), config, {}))


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


def test_many_clients_hold_little_more_than_one():
    """Each sends as much as it may, one after another, and ends no body."""
    bodies = BodyMemory(1000)
    with contextlib.ExitStack() as open_bodies:
        for i in range(200):
            count = open_bodies.enter_context(bodies.hold(str(i)))
            with contextlib.suppress(HTTPException):
                for _ in range(1000):
                    count(1)
        assert bodies.num_bytes < 6.5 * 1000  # 1 + 1/2 + ... + 1/200 = 5.9
    assert (bodies.num_bytes, bodies._held) == (0, {})


def test_recordings_that_wait_are_freed_with_their_request():
    """The thread that encodes is busy when their client leaves."""
    calls = []
    runner = SimpleNamespace(
        engine=FakeEngine(), start_encoding=lambda call, client: calls.append(call)
    )

    class Recording(bytearray):
        pass

    async def leave() -> weakref.ref:
        voices = VoiceService(runner, Config())
        recording = Recording(10)
        waiting = asyncio.create_task(voices._beside(recording.extend, "a"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        return weakref.ref(recording)

    recording = asyncio.run(leave())
    gc.collect()
    assert recording() is None
    (call,) = calls
    call()  # does nothing


def test_encoding_ends_when_nobody_waits_for_it():
    pieces, done = [], threading.Event()

    async def leave() -> None:
        voices = VoiceService(Runner(FakeEngine(), 1), Config())
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work(pause) -> None:
            try:
                while len(pieces) < 1000:
                    pieces.append(0)
                    loop.call_soon_threadsafe(begun.set)
                    time.sleep(0.01)
                    pause(0)
            finally:
                done.set()

        waiting = asyncio.create_task(voices._beside(work, "a"))
        await begun.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        assert await asyncio.to_thread(done.wait, TIMEOUT_S)

    asyncio.run(leave())
    assert len(pieces) < 1000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("json", b'{"text": "a", "context": [' + b"[]," * 2**18 + b"[]]}"),
        ("json", b'{"text": "a", "context": [' + b"0," * 2**18 + b"0]}"),
        ("x-www-form-urlencoded", b"text=a&context=" + b"%5B" * (2**18 + 1)),
    ],
)
def test_bodies_that_would_hold_pythons_lock_are_refused(kind, body):
    with serve(FakeEngine()) as client:
        answer = client.post(
            "/generate", content=body, headers={"content-type": f"application/{kind}"}
        )
        assert_refused(answer, 413, str(2**18))


def test_a_context_as_text_has_the_same_bound():
    with pytest.raises(ContextError, match=f"more than {2**18} values"):
        parse_context("[" + "[]," * 2**18 + "[]]")
