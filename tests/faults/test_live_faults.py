"""The WebSocket and clients that break its rules, leave, or wait; and a server that ends."""

import asyncio
import contextlib
import json
import os
import random
import socket
import struct
import threading

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from checkpoints import TinyShape, build_tiny
from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine
from live_client import live_client
from live_server import LiveServer, wait_until
from vox_serve import live, live_connection
from vox_serve.loading import load_engine
from vox_serve.long_form import LongForm

SECRET = "s3cret-one"


def serve(engine=None, **settings) -> LiveServer:
    return LiveServer(LongForm(engine or FakeEngine(), 400), **settings)


def closing(client) -> tuple[int, str]:
    """Code and reason with which the server closes the connection."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            client.socket.recv(TIMEOUT_S)
    return client.socket.close_code, client.socket.close_reason


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("", None),
        ("hello", None),
        ("[]", None),
        ("null", None),
        ("[" * 5000, None),
        ("{}", "type"),
        ('{"type": "speak"}', "type"),
        ('{"type": ["text"]}', "type"),
        ('{"type": "text"}', "text"),
        ('{"type": "text", "text": 5}', "text"),
        ('{"type": "text", "text": "a", "turn": 1}', "turn"),
        ('{"type": "text", "text": "\\ud83d\\ud83d"}', "text"),
        ('{"type": "end", "x": 1}', "x"),
        ('{"type": "cancel", "played_ms": -1}', "played_ms"),
        ('{"type": "cancel", "played_ms": "5"}', "played_ms"),
        ('{"type": "cancel", "played_ms": NaN}', "played_ms"),
        ('{"type": "cancel", "played_ms": 1e999}', "played_ms"),
        ('{"type": "cancel"}', "type"),
        ('{"type": "session", "temperature": -1}', "temperature"),
        ('{"type": "session", "temperature": "hot"}', "temperature"),
        ('{"type": "session", "max_frames": 999999}', "max_frames"),
        ('{"type": "session", "format": "mp5"}', "format"),
        ('{"type": "session", "format": "ulaw", "sample_rate": 24000}', "sample_rate"),
        ('{"type": "session", "conversation": "a/b"}', "conversation"),
        ('{"type": "session", "voice": "../x"}', "voice"),
        (b"\x00\x01", None),
    ],
)
def test_a_bad_message_gets_an_error_that_names_the_field(message, field):
    with serve() as server, live_client(server.port) as client:
        client.socket.send(message)
        error = client.events("error")[-1]
        assert error["field"] == field
        assert 0 < len(error["message"]) < 500
        done = client.speak(["Hello."])
        assert (done["finish_reason"], done["samples"]) == ("stop", 3 * 1920)


def test_too_many_bad_messages_close_the_connection():
    with serve() as server, live_client(server.port) as client:
        for _ in range(live_connection.MAX_ERRORS):
            client.socket.send("x")
        assert closing(client) == (1008, "too many messages were refused")


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (bytes([0x81, 0x82, 0, 0, 0, 0, 0xC3, 0x28]), 1007),  # not UTF-8
        (bytes([0x81, 0xFF]) + struct.pack(">QI", 2**40, 0), 1009),  # too long
        (bytes([0xF1, 0x80, 0, 0, 0, 0]), 1002),  # reserved bits
    ],
)
def test_a_broken_frame_closes_the_connection(frame, code):
    with serve() as server, live_client(server.port) as client:
        client.socket.socket.sendall(frame)
        assert closing(client)[0] == code


def test_a_long_message_closes_the_connection():
    with serve(max_body_bytes=2048) as server, live_client(server.port) as client:
        client.send("text", text="x" * 4096)
        assert closing(client)[0] == 1009


def test_a_text_that_is_too_long_is_refused_and_the_rest_spoken():
    with serve(max_text_chars=20) as server, live_client(server.port) as client:
        client.write(["Hello there.", " This is too long."])
        error = client.events("error")[-1]
        assert (error["field"], error["turn"]) == ("text", 1)
        assert client.events("turn.done")[-1]["samples"] == 3 * 1920


def test_turns_that_wait_are_bounded():
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)
    with serve(engine) as server, live_client(server.port) as client:
        for _ in range(live_connection.MAX_WAITING_TURNS + 1):
            client.write(["Hello."])
        client.send("text", text="One more.")
        error = client.events("error")[-1]
        assert (error["field"], error["retry_after_s"]) == ("text", 1)


def test_the_texts_of_all_turns_are_bounded(monkeypatch):
    monkeypatch.setattr(live, "MAX_TEXT_BYTES", 2000)
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)
    with serve(engine) as server, live_client(server.port) as client:
        client.write(["Hello."])
        client.events("sentence.begin")
        client.send("text", text="x" * 1500)
        client.send("text", text="é" * 200)
        error = client.events("error")[-1]
        assert (error["field"], error["retry_after_s"]) == ("text", 1)
        client.send("text", text="y" * 100)  # the refused text was given up
        client.send("cancel")
        client.events("cancelled")
        client.events("cancelled")
        wait_until(lambda: server.app.state.live.texts.num_bytes == 0)
    with serve(engine) as server:
        with live_client(server.port) as client:
            client.write(["Hello. "], end=False)
            client.events("sentence.begin")
        wait_until(lambda: not server.app.state.live.connections)
        assert server.app.state.live.texts.num_bytes == 0


def test_a_failed_turn_is_reported_and_the_next_one_spoken():
    with serve() as server, live_client(server.port) as client:
        client.write(["late poison"])
        error, done = client.events("turn.done")[-2:]
        assert (error["type"], error["turn"]) == ("error", 1)
        assert (done["turn"], done["finish_reason"], done["samples"]) == (1, "error", 2 * 1920)
        assert client.speak(["Hello."])["finish_reason"] == "stop"


def test_an_engine_that_breaks_while_text_is_awaited():
    engine = FakeEngine()
    with serve(engine) as server, live_client(server.port) as client:
        client.write(["Hello there. And"], end=False)
        client.events("sentence.end")
        engine.fail_at_step = 1
        client.write([" so on."])
        done = client.events("turn.done")[-1]
        assert (done["finish_reason"], done["samples"]) == ("error", 3 * 1920)
        assert client.speak(["Hello."])["finish_reason"] == "stop"
        wait_until(lambda: not server.runner._jobs)


@pytest.mark.parametrize(
    ("headers", "settings", "status"),
    [
        ({"Origin": "https://evil.example"}, {}, 403),
        ({"Origin": "null"}, {}, 403),
        ({"Origin": "https://app.example"}, {"cors_origins": "https://app.example"}, None),
        ({"Host": "evil.example"}, {}, 403),
        ({}, {"api_key": SECRET}, 401),
        ({"X-API-Key": "wrong"}, {"api_key": SECRET}, 401),
        ({"X-API-Key": SECRET}, {"api_key": SECRET}, None),
        ({"Authorization": f"Bearer {SECRET}"}, {"api_key": SECRET}, None),
        ({"Sec-WebSocket-Protocol": f"voxkern, voxkern.api_key.{SECRET}"},
         {"api_key": SECRET}, None),
        ({"Sec-WebSocket-Protocol": "voxkern, voxkern.api_key.wrong"}, {"api_key": SECRET}, 401),
    ],
)  # fmt: skip
def test_access_is_checked(headers, settings, status):
    with serve(**settings) as server:
        if status is None:
            subprotocols = headers.pop("Sec-WebSocket-Protocol", None)
            options = {"subprotocols": subprotocols.split(", ")} if subprotocols else {}
            with live_client(server.port, additional_headers=headers, **options) as client:
                assert client.speak(["Hello."])["finish_reason"] == "stop"
            return
        assert handshake(server.port, headers) == status
        assert not server.app.state.live.connections


def test_a_refusal_is_no_error_in_the_log(caplog):
    with serve(api_key=SECRET) as server:
        assert handshake(server.port, {}) == 401
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def handshake(port: int, headers: dict[str, str]) -> int:
    """The status of the answer to a handshake with these headers."""
    lines = {"Host": f"127.0.0.1:{port}"} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as raw:
        raw.sendall(
            b"GET /v1/audio/speech/stream HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            + f"{head}\r\n".encode()
        )
        return int(raw.recv(100).split()[1])


def test_an_idle_connection_is_closed():
    with serve(live_idle_s=0.1) as server, live_client(server.port) as client:
        assert closing(client)[0] == 4408
        wait_until(lambda: not server.app.state.live.connections)


def test_a_busy_connection_is_not_idle():
    engine = FakeEngine(num_frames=20, step_s=0.02)
    with serve(engine, live_idle_s=0.1) as server, live_client(server.port) as client:
        assert client.speak(["Hello."])["samples"] == 20 * 1920
        assert closing(client)[0] == 4408


def test_connections_are_limited_and_shared():
    """A client with many loses an idle one to a client with none."""
    with serve(api_key="one,two", max_live_connections=3) as server:

        def connect(key):
            return live_client(server.port, additional_headers={"X-API-Key": key})

        with contextlib.ExitStack() as stack:
            first, *_ = [stack.enter_context(connect("one")) for _ in range(3)]
            with pytest.raises(InvalidStatus) as refused, connect("one"):
                pass
            assert refused.value.response.status_code == 429
            assert refused.value.response.headers["Retry-After"] == "1"
            other = stack.enter_context(connect("two"))
            assert closing(first)[0] == 1013
            assert other.speak(["Hello."])["finish_reason"] == "stop"
            with pytest.raises(InvalidStatus), connect("two"):
                pass


def test_a_reader_that_stops_is_dropped():
    engine = FakeEngine(num_frames=ENDLESS)
    with serve(engine, stall_timeout_s=0.5) as server:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        raw.connect(("127.0.0.1", server.port))
        with live_client(server.port, sock=raw, max_queue=1) as client:
            client.write(["Hello there. And so on."])
            wait_until(lambda: server.app.state.live.connections)
            wait_until(lambda: not server.app.state.live.connections)
        assert engine.saw_abort.wait(TIMEOUT_S)
        assert_nothing_is_left(server)


def test_a_shutdown_that_cannot_wait_cuts_the_turn():
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)
    with serve(engine, drain_s=0.1) as server, live_client(server.port) as client:
        client.write(["Hello."])
        client.events("sentence.begin")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        error, done = client.events("turn.done")[-2:]
        assert (error["message"], done["finish_reason"]) == ("the server is shutting down", "error")
        assert closing(client) == (1012, "the server is shutting down")
        stopping.join()


@pytest.mark.parametrize("ends", [True, False])
def test_shutdown_finishes_the_turn_and_begins_no_other(ends):
    engine = FakeEngine(num_frames=100, step_s=0.005)
    with serve(engine, drain_s=float(TIMEOUT_S)) as server, contextlib.ExitStack() as stack:
        idle = stack.enter_context(live_client(server.port))
        client = stack.enter_context(live_client(server.port))
        client.write(["Hello there. And"], end=False)
        client.events("sentence.begin")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert closing(idle) == (1012, "the server is shutting down")
        assert handshake(server.port, {}) == 503
        if ends:
            client.write([" so on."])
            client.write(["One more."])
            error = client.events("error")[-1]
            assert error["message"] == "the server is shutting down"
            assert client.events("turn.done")[-1]["samples"] == 200 * 1920
        else:
            client.send("cancel")
            client.events("cancelled")
        assert closing(client)[0] == 1012
        stopping.join()


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_messages_ends_each_turn_once(seed, caplog):
    source = random.Random(seed)
    engine = FakeEngine(num_frames=5, step_s=source.choice([0, 0.001, 0.005]))
    with serve(engine, live_text_timeout_s=source.choice([0.01, 20])) as server:
        for _ in range(5):
            with live_client(server.port) as client:
                for _ in range(source.randrange(40)):
                    message = source.choice(_MESSAGES)
                    client.send(**message)
                    if source.random() < 0.1:
                        wait_until(lambda: server.runner.count_jobs() != (0, 1))
                client.send("close")
                assert_turns_end_once(client)
        assert_nothing_is_left(server)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


_MESSAGES = [
    *[{"kind": "text", "text": text} for text in ("Hello. ", "And so", " on. Yes", "\n\n", "")],
    *[{"kind": kind} for kind in ("flush", "end", "end", "cancel", "text")],
    {"kind": "cancel", "played_ms": 100},
    {"kind": "session", "seed": 1},
]


def assert_turns_end_once(client) -> None:
    """Read all events; turns begin in order, and each ends once before the next begins."""
    open_turn, ended = None, []
    with contextlib.suppress(ConnectionClosed):
        while True:
            event = client.event()
            kind, turn = event["type"], event.get("turn")
            if kind == "sentence.begin":
                assert open_turn in (None, turn)
                assert turn not in ended
                open_turn = turn
            elif kind == "turn.done" or (kind == "cancelled" and turn not in ended):
                assert open_turn in (None, turn)
                assert turn not in ended
                ended.append(turn)
                open_turn = None
            elif kind == "cancelled":  # after its end, while it is played
                assert ended[-1] >= turn
    assert client.socket.close_code == 1000
    assert sorted(ended) == list(range(1, len(ended) + 1))


def assert_nothing_is_left(server: LiveServer, files: int | None = None) -> None:
    """No connection, job, row, conversation, task or descriptor is left."""
    runner, engine = server.runner, server.runner.engine
    loop = server.server.servers[0].get_loop()
    wait_until(lambda: not server.app.state.live.connections)
    wait_until(lambda: not runner._jobs and not len(runner._queue))
    wait_until(lambda: not (engine.rows or engine._passages or engine._starved))
    wait_until(lambda: not len(server.app.state.conversations.kept))
    wait_until(lambda: runner.unread_bytes == 0)
    wait_until(lambda: len(asyncio.all_tasks(loop)) <= 2)  # the server's own, and its lifespan
    wait_until(lambda: not server.server.server_state.connections)
    if files is not None:
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_connects_and_kills_leave_nothing_behind(count, tmp_path):
    folder = build_tiny(TinyShape(max_positions=256), seed=12).write(tmp_path)
    engine = load_engine(str(folder), dtype="float32", prefix_cache_bytes=0, max_batch_size=4)
    source = random.Random(count)
    with LiveServer(LongForm(engine, 40), max_frames=20, max_cancels_per_s=0) as server:
        with live_client(server.port) as client:
            client.speak(["Hello."])
        assert_nothing_is_left(server)
        files = len(os.listdir("/proc/self/fd"))
        pages = engine.cache_counts()["pages_held"]
        open_sockets: list[socket.socket] = []
        for _ in range(count):
            raw = socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S)
            open_sockets.append(raw)
            raw.sendall(_request(server.port)[: source.choice([60, 10_000, 10_000, 10_000])])
            for message in source.choice(_SCRIPTS):
                raw.sendall(_frame(message))
            if source.random() < 0.5:
                with contextlib.suppress(TimeoutError):
                    raw.settimeout(source.choice([0.001, 0.02]))
                    raw.recv(10_000)
            if len(open_sockets) > 8 or source.random() < 0.3:
                _kill(open_sockets.pop(source.randrange(len(open_sockets))), source)
        for raw in open_sockets:
            _kill(raw, source)
        assert_nothing_is_left(server, files)
        # The engine's thread takes a row out of `rows` before it frees the row's pages.
        wait_until(lambda: engine.cache_counts()["pages_held"] == pages)
        with live_client(server.port) as client:
            assert client.speak(["Hello."])["samples"] == 20 * 1920


_SCRIPTS = [
    [],
    [{"type": "session", "seed": 1}],
    [{"type": "text", "text": "Hello there. And"}],
    [{"type": "text", "text": "Hello there. And so."}, {"type": "end"}],
    [{"type": "text", "text": "One two. Three"}, {"type": "cancel", "played_ms": 80}],
    [{"type": "text", "text": "One."}, {"type": "end"}] * 3,
    [{"type": "text", "text": "One. Two"}, {"type": "close"}],
    [{"type": "oops"}],
]


def _request(port: int) -> bytes:
    return (
        f"GET /v1/audio/speech/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).encode()


def _frame(message: dict) -> bytes:
    """A text frame, masked with zeros."""
    data = json.dumps(message).encode()
    assert len(data) < 126
    return bytes([0x81, 0x80 | len(data), 0, 0, 0, 0]) + data


def _kill(raw: socket.socket, source: random.Random) -> None:
    if source.random() < 0.5:  # a reset instead of an orderly end
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()
