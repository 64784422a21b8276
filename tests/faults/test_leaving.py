"""Clients that leave while their recordings are decoded and encoded: the rest is not done."""

import base64
import json
import socket
import threading

import pytest

from fake_engine import TIMEOUT_S, FakeEngine
from live_server import LiveServer, wait_until
from recordings import tone
from vox_serve import context_field, voice_maker

AUDIO = base64.b64encode(tone(seconds=4)).decode()  # some pieces of 0.64 s
RECORDING = {"audio": AUDIO, "transcript": "x"}
SEGMENT = {"speaker": 0, "text": "x", "audio": AUDIO}
UPLOADS = {
    "/v1/audio/voices": {"name": "alice", "recordings": [RECORDING] * 3},
    "/v1/conversations/a/turns": SEGMENT,
    "/generate": {"text": "x", "context": [SEGMENT] * 3},
}


def send(server: LiveServer, path: str) -> socket.socket:
    content = json.dumps(UPLOADS[path]).encode()
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    raw.sendall(head.encode() + content)
    return raw


@pytest.mark.parametrize("unit", ["decode", "encode"])
@pytest.mark.parametrize("path", UPLOADS)
def test_no_further_unit_of_work_is_done(path, unit, monkeypatch):
    engine = FakeEngine()
    begun, go_on = threading.Event(), threading.Event()
    num_units = 0

    def wait() -> None:
        nonlocal num_units
        num_units += 1
        begun.set()
        assert go_on.wait(TIMEOUT_S)

    if unit == "encode":
        engine.mimi.before_piece = wait
    for module in (context_field, voice_maker):
        decode = module.decode

        def slow(*args, decode=decode):
            if unit == "decode":
                wait()
            return decode(*args)

        monkeypatch.setattr(module, "decode", slow)
    with LiveServer(engine) as server:
        raw = send(server, path)
        assert begun.wait(TIMEOUT_S)
        raw.close()
        wait_until(lambda: not server.server.server_state.tasks)
        go_on.set()
        done = threading.Event()
        server.runner.start_encoding(done.set, "b")  # runs when the other is given up
        assert done.wait(TIMEOUT_S)
        assert num_units == 1
        assert server.app.state.voices.store.names() == []
        assert engine.requests == []
