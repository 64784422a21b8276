"""Clients that are slow, silent, half-closed or gone, on real sockets."""

import contextlib
import http.client
import json
import re
import socket
import struct
import time

import pytest

from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine, expected_pcm
from live_server import LiveServer, wait_until
from vox_serve.audio import wav_file, wav_header

SOON = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "keep_alive_s": 0.3, "stall_timeout_s": 0.4}
HEAD = b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = wav_file(expected_pcm("hello", 3))


def connect(server: LiveServer, sent: bytes = b"", small: bool = False) -> socket.socket:
    raw = socket.socket()
    if small:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    raw.settimeout(TIMEOUT_S)
    raw.connect(("127.0.0.1", server.port))
    raw.sendall(sent)
    return raw


def post(body: bytes | None = None, **fields) -> bytes:
    content = json.dumps(fields).encode() if body is None else body
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content


def read_all(raw: socket.socket) -> bytes:
    """Everything until the server closes the connection, in whatever way."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := raw.recv(65536):
            received += piece
    return received


def answer_of(raw: socket.socket) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    return answer


def assert_serves(server: LiveServer) -> None:
    assert server.post(text="hello").read() == WHOLE


def no_requests(server: LiveServer) -> bool:
    """True if no request, task or connection is left."""
    state = server.server.server_state
    return server.runner.count_jobs() == (0, 0) and not state.tasks and not state.connections


def trickle(raw: socket.socket, piece: bytes = b"x") -> bytes:
    """Send a piece every 20 ms until the server answers or closes; return what it sent."""
    raw.setblocking(False)
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(0.02)
        try:
            return raw.recv(65536)
        except BlockingIOError:
            with contextlib.suppress(ConnectionError):
                raw.send(piece)
        except ConnectionError:
            return b""
    raise AssertionError("the server still waits")


# Slow and silent clients


@pytest.mark.parametrize("sent", [b"P", HEAD, HEAD + b"X: "])
def test_a_head_that_does_not_arrive_is_408(sent):
    with LiveServer(FakeEngine(), **SOON) as server:
        for send in (read_all, trickle):
            raw = connect(server, sent)
            assert_serves(server)
            assert send(raw).startswith(b"HTTP/1.1 408 ")
            raw.close()
        wait_until(lambda: no_requests(server))


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00",  # TLS
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000,
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n",
    ],
)
def test_what_is_not_http_is_400_in_json(sent):
    with LiveServer(FakeEngine()) as server:
        answer = answer_of(connect(server, sent))
        assert answer.status == 400
        assert json.load(answer)["detail"]
        assert_serves(server)


def test_a_client_that_sends_nothing_is_closed_without_an_answer():
    with LiveServer(FakeEngine(), **SOON) as server:
        assert read_all(connect(server)) == b""
        wait_until(lambda: no_requests(server))


@pytest.mark.parametrize(
    "head", [b"Content-Length: 9999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"]
)
def test_a_body_that_does_not_arrive_is_408(head):
    engine = FakeEngine()
    with LiveServer(engine, **SOON) as server:
        for send in (read_all, lambda raw: trickle(raw, b"1\r\nx\r\n")):
            raw = connect(server, HEAD + head)
            assert_serves(server)
            assert send(raw).startswith(b"HTTP/1.1 408 ")
            raw.close()
        wait_until(lambda: no_requests(server))
    assert [request.text for request in engine.requests] == ["hello"] * 2


@pytest.mark.parametrize(("path", "has_error"), [("/v1/audio/speech", True), ("/generate", False)])
def test_a_late_body_gets_the_errors_of_its_path_and_is_counted_once(path, has_error):
    with LiveServer(FakeEngine(), **SOON) as server:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
        answer = answer_of(connect(server, head.encode()))
        assert answer.status == 408
        fields = json.load(answer)
        assert ("error" in fields) is has_error
        if has_error:
            assert fields["error"]["message"] == fields["detail"]
            assert fields["error"]["type"] == "invalid_request_error"
        wait_until(lambda: no_requests(server))
        assert server.app.statuses == {408: 1}


@pytest.mark.parametrize("sent", [b"P", b"\x16\x03\x01\x02\x00"])
def test_an_answer_before_the_path_is_known_has_both_shapes(sent):
    with LiveServer(FakeEngine(), **SOON) as server:
        answer = answer_of(connect(server, sent))
        fields = json.load(answer)
        assert fields["error"]["message"] == fields["detail"]
        assert server.app.statuses == {answer.status: 1}


def test_a_body_that_arrives_at_a_fair_rate_is_not_cut(monkeypatch):
    body = json.dumps({"text": "hello"}).encode().ljust(60_000)
    with LiveServer(FakeEngine(), **SOON | {"body_timeout_s": 0.2}) as server:
        raw = connect(server, HEAD + b"Content-Length: 60000\r\n\r\n")
        for i in range(0, len(body), 2000):  # 100 kB/s, in 0.6 s
            raw.sendall(body[i : i + 2000])
            time.sleep(0.02)
        assert answer_of(raw).read() == WHOLE


def test_an_idle_connection_is_closed_and_a_busy_one_is_not():
    with LiveServer(FakeEngine(), **SOON) as server:
        raw = connect(server)
        for _ in range(5):
            raw.sendall(post(text="hello"))
            assert answer_of(raw).read() == WHOLE
            time.sleep(0.15)
        assert read_all(raw) == b""


def test_a_head_begun_on_a_kept_connection_is_timed_too():
    with LiveServer(FakeEngine(), **SOON) as server:
        raw = connect(server, post(text="hello"))
        assert answer_of(raw).read() == WHOLE
        assert trickle(raw, b"G").startswith(b"HTTP/1.1 408 ")


# Clients that do not read


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_stops_reading_is_dropped(streaming):
    engine = FakeEngine(num_frames=ENDLESS, max_batch_size=1)
    with LiveServer(engine, max_frames=300, max_queue_size=1, **SOON) as server:
        stalled = connect(server, post(text="stalled", streaming=streaming), small=True)
        wait_until(lambda: engine.requests)
        answer = server.post(text="next", max_frames=1)
        assert answer.read() == wav_file(expected_pcm("next", 1, cut=True))
        wait_until(lambda: no_requests(server))
        assert len(read_all(stalled)) < 300 * 3840


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_reads_slowly_but_steadily_gets_everything(streaming):
    engine = FakeEngine(num_frames=ENDLESS)
    with LiveServer(engine, max_frames=600, **SOON) as server:
        raw = connect(server, post(text="slow", streaming=streaming), small=True)
        answer = answer_of(raw)
        pcm, start = b"", time.monotonic()
        while piece := answer.read1(65536):
            pcm += piece
            if time.monotonic() - start < 1.5:
                time.sleep(0.01)
        assert pcm[44:] == expected_pcm("slow", 600, cut=True)


def test_unread_answers_are_bounded_in_all():
    engine = FakeEngine(num_frames=ENDLESS)
    settings = SOON | {"stall_timeout_s": 600, "max_unread_bytes": 2**16}
    with LiveServer(engine, max_frames=300, max_queue_size=9, **settings) as server:
        raws = [connect(server, post(text=f"{i}"), small=True) for i in range(3)]
        wait_until(lambda: len(engine.requests) == 3 and no_requests(server))
        assert all(len(read_all(raw)) < 300 * 3840 for raw in raws)
        assert_serves_one_frame(server)


def assert_serves_one_frame(server: LiveServer) -> None:
    assert server.post(text="x", max_frames=1).read() == wav_file(expected_pcm("x", 1, cut=True))


# Half-closed clients, and clients that are gone


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_half_closed_client_gets_its_answer(streaming, version):
    with LiveServer(FakeEngine(step_s=0.05)) as server:
        sent = post(text="hello", streaming=streaming).replace(b"HTTP/1.1", b"HTTP/" + version)
        raw = connect(server, sent)
        raw.shutdown(socket.SHUT_WR)
        received = read_all(raw)
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        if not streaming:
            assert body == WHOLE
        else:
            assert (wav_header(None) + expected_pcm("hello", 3)) == (
                body if version == b"1.0" else unchunked(body)
            )
        wait_until(lambda: no_requests(server))


def unchunked(body: bytes) -> bytes:
    content = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if size == b"0":
            return content
        content += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]


def test_a_half_closed_client_gets_an_error_answer_too():
    with LiveServer(FakeEngine()) as server:
        raw = connect(server, post(b"{}"))
        raw.shutdown(socket.SHUT_WR)
        answer = answer_of(raw)
        assert answer.status == 422
        assert "text" in str(json.load(answer))
        assert raw.recv(1) == b""


def test_a_long_answer_to_a_half_closed_client_is_complete():
    with LiveServer(FakeEngine(num_frames=ENDLESS), max_frames=1125) as server:
        raw = connect(server, post(text="hello"), small=True)
        raw.shutdown(socket.SHUT_WR)
        time.sleep(0.3)
        assert answer_of(raw).read() == wav_file(expected_pcm("hello", 1125, cut=True))


def test_a_half_closed_client_gets_all_pipelined_answers():
    with LiveServer(FakeEngine(step_s=0.02)) as server:
        raw = connect(server, post(text="a") + post(text="b") + post(text="c"))
        raw.shutdown(socket.SHUT_WR)
        pieces = read_all(raw).split(b"HTTP/1.1 200 OK\r\n")
        bodies = [piece.partition(b"\r\n\r\n")[2] for piece in pieces[1:]]
        assert bodies == [wav_file(expected_pcm(text, 3)) for text in "abc"]
        wait_until(lambda: no_requests(server))


def reset(raw: socket.socket) -> None:
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


@pytest.mark.parametrize("half_close", [False, True])
@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("pause_s", [0, 0.15])
def test_a_client_that_is_gone_ends_its_request(half_close, leave, streaming, pause_s):
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.01)
    with LiveServer(engine) as server:
        raw = connect(server, post(text="hello", streaming=streaming))
        wait_until(lambda: server.runner.count_jobs() == (1, 0))
        if half_close:
            raw.shutdown(socket.SHUT_WR)
        time.sleep(pause_s)
        leave(raw)
        assert engine.saw_abort.wait(TIMEOUT_S)
        wait_until(lambda: no_requests(server))
        assert_serves_one_frame(server)


@pytest.mark.parametrize("more", [post(text="b"), b"\r\n"])
@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_a_gone_client_that_sent_more_ends_its_first_request(leave, more):
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.01)
    with LiveServer(engine, **SOON | {"stall_timeout_s": 600}) as server:
        raw = connect(server, post(text="a") + more)
        wait_until(lambda: server.runner.count_jobs() == (1, 0))
        leave(raw)
        wait_until(lambda: no_requests(server))
        wait_until(lambda: len(engine.aborted) == len(engine.requests))


def test_a_client_that_closes_with_part_of_a_request_sent_leaves_nothing():
    with LiveServer(FakeEngine()) as server:
        for sent in (b"", b"POST /gen", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{"):
            connect(server, sent).close()
            half = connect(server, sent)
            half.shutdown(socket.SHUT_WR)
            assert read_all(half) == b""
        wait_until(lambda: no_requests(server))


# Answers before the end of a request


@pytest.mark.parametrize(
    ("path", "status"), [(b"/generate", 413), (b"/nowhere", 404), (b"/health", 405)]
)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_rest_of_a_large_body_is_not_read(path, status, framing):
    """A client that sends everything before it reads sees an answer, or its connection closed."""
    with LiveServer(FakeEngine()) as server:
        head = b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % path
        piece = b"x" * 65536
        if framing == "length":
            head += b"Content-Length: 100000000\r\n\r\n"
        else:
            head += b"Transfer-Encoding: chunked\r\n\r\n"
            piece = b"10000\r\n" + piece + b"\r\n"
        raw = connect(server, head)
        num_sent = 0
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(1600):
                raw.sendall(piece)
                num_sent += len(piece)
        assert num_sent < 20_000_000
        raw.close()

        raw = connect(server, head + piece * 8)
        answer = answer_of(raw)
        assert answer.status == status
        assert answer.getheader("connection") == "close"
        assert json.loads(answer.read())["detail"]
        assert raw.recv(1) == b""
        raw.close()
        wait_until(lambda: no_requests(server))
        assert_serves(server)


def test_a_client_that_waits_for_100_continue_never_sends_a_large_body():
    with LiveServer(FakeEngine()) as server:
        raw = connect(server, HEAD + b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n")
        assert answer_of(raw).status == 413
        raw.close()

        body = json.dumps({"text": "hello"}).encode()
        raw = connect(
            server, HEAD + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(body)
        )
        assert raw.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n" or b"100 " in raw.recv(0)
        raw.sendall(body)
        assert answer_of(raw).read() == WHOLE


# Odd requests


@pytest.fixture(scope="module")
def shared_server():
    with LiveServer(FakeEngine(), header_timeout_s=1, keep_alive_s=0.5) as server:
        yield server


@pytest.mark.parametrize(
    ("odd", "statuses"),
    [
        pytest.param(b"GET /health HTTP/1.1\r\n\r\n", {400, 200}, id="no Host"),
        pytest.param(b"GET /health HTTP/1.0\r\n\r\n", {200}, id="HTTP/1.0"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", {400, 200}, id="hosts"),
        pytest.param(b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n", {400, 200}, id="version"),
        pytest.param(b"GET  /health  HTTP/1.1\r\nHost: a\r\n\r\n", {400}, id="spaces"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400, 408}, id="TLS"),
        pytest.param(b"nonsense\r\n\r\n", {400}, id="nonsense"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nA\x00: b\r\n\r\n", {400}, id="nul"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rY: b\r\n\r\n", {400, 404}, id="bare CR"),
        pytest.param(b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000, {400, 431}, id="long line"),
        pytest.param(b"GET /" + b"a" * 200_000, {400, 431}, id="long path"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 40_000, {400, 431}, id="many lines"),
        pytest.param(HEAD + b"Content-Length: -1\r\n\r\n", {400}, id="negative length"),
        pytest.param(HEAD + b"Content-Length: 1e3\r\n\r\n", {400}, id="length in words"),
        pytest.param(HEAD + b"Content-Length: 1%030d\r\n\r\n" % 0, {400, 413}, id="length"),
        pytest.param(
            HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", {400}, id="two lengths"
        ),
        pytest.param(
            HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            {400},
            id="length and chunked",
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            {400, 501},
            id="chunked twice",
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", {400, 501}, id="gzip"
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", {400}, id="space before colon"
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n", {400}, id="chunk size"
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n", {400}, id="negative chunk"
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n", {400}, id="size"
        ),
    ],
)  # fmt: skip
def test_an_odd_request_is_refused_and_the_connection_closed(odd, statuses, shared_server):
    raw = connect(shared_server)
    with contextlib.suppress(ConnectionError):
        raw.sendall(odd)
    received = read_all(raw)
    raw.close()
    assert received.startswith(b"HTTP/1.1 ")
    assert int(received[9:12]) in statuses
    assert received.count(b"HTTP/1.1 ") == 1
    assert_serves(shared_server)
    wait_until(lambda: no_requests(shared_server))


def test_pipelined_requests_are_answered_in_order():
    with LiveServer(FakeEngine()) as server:
        raw = connect(server, post(text="a") + post(text="b") + post(text="c", streaming=True))
        reader = raw.makefile("rb")
        for text in "ab":
            head = [reader.readline()]
            while head[-1] != b"\r\n":
                head.append(reader.readline())
            (size,) = re.findall(rb"content-length: (\d+)", b"".join(head).lower())
            assert reader.read(int(size)) == wav_file(expected_pcm(text, 3))
        assert reader.readline() == b"HTTP/1.1 200 OK\r\n"


# Limits


def test_a_new_connection_takes_the_place_of_the_one_silent_for_longest():
    with LiveServer(FakeEngine(), max_connections=4) as server:
        idle = [connect(server) for _ in range(4)]
        wait_until(lambda: len(server.server.server_state.connections) == 4)
        idle[0].sendall(b"POST ")  # now the second has been silent for longest
        time.sleep(0.1)
        for i in range(2):
            assert_serves(server)
            assert idle[i + 1].recv(1) == b"" if i == 0 else True
        idle[0].sendall(post(text="hello").removeprefix(b"POST "))
        assert answer_of(idle[0]).read() == WHOLE


@pytest.mark.parametrize("streaming", [False, True])
def test_a_full_house_of_unread_answers_drops_the_oldest(streaming):
    engine = FakeEngine(num_frames=ENDLESS)
    with LiveServer(engine, max_connections=2, max_frames=300, stall_timeout_s=600) as server:
        raws = []
        for i in range(2):
            raws.append(connect(server, post(text=f"{i}", streaming=streaming), small=True))
            wait_until(lambda i=i: len(engine.requests) == i + 1)
        wait_until(lambda: not engine.has_work)
        wait_until(
            lambda: all(c.is_waiting_for_reader for c in server.server.server_state.connections)
        )
        assert_serves_one_frame(server)
        assert len(read_all(raws[0])) < 300 * 3840
        assert len(answer_of(raws[1]).read()) == 44 + 300 * 3840


def test_requests_in_flight_are_never_dropped_for_a_new_connection():
    engine = FakeEngine(num_frames=ENDLESS, max_batch_size=3, step_s=0.005)
    with LiveServer(engine, max_connections=3) as server:
        busy = [connect(server, post(text=f"{i}", max_frames=100)) for i in range(3)]
        wait_until(lambda: len(engine.requests) == 3)
        refused = answer_of(connect(server))
        assert refused.status == 429
        assert refused.headers["Retry-After"] == "1"
        assert json.load(refused)["detail"]
        for i, raw in enumerate(busy):
            assert answer_of(raw).read() == wav_file(expected_pcm(f"{i}", 100, cut=True))
        assert_serves_one_frame(server)
