"""Requests on real sockets that are valid HTTP, or nearly, and meant to cost or to confuse."""

import http.client
import json
import socket

import pytest

from fake_engine import TIMEOUT_S, FakeEngine, expected_pcm
from live_server import LiveServer, wait_until
from process_server import ProcessServer
from vox_serve.audio import wav_file
from vox_serve.bounded_h11 import MAX_SMALL_CHUNKS
from vox_serve.context_field import MAX_SEGMENTS
from vox_serve.http_io import MAX_OBJECT_FIELDS

WHOLE = wav_file(expected_pcm("hello", 3))
HELLO = b'{"text": "hello"}'
GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server():
    with LiveServer(FakeEngine(), max_errors_per_s=0) as server:
        yield server
        assert server.post(text="hello").read() == WHOLE
        wait_until(lambda: server.runner.count_jobs() == (0, 0))


def connect(server: LiveServer, sent: bytes) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S)
    raw.sendall(sent)
    return raw


def head(path: str = "/generate", *headers: str, method: str = "POST", version: str = "1.1"):
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode()


def answer_of(raw: socket.socket, method: str = "POST") -> tuple[http.client.HTTPResponse, bytes]:
    answer = http.client.HTTPResponse(raw, method=method)
    answer.begin()
    return answer, answer.read()


def bodies_of(raw: socket.socket) -> list[bytes]:
    """Bodies of all answers until the server closes. One reader takes them all: it reads ahead."""
    bodies = []
    with raw.makefile("rb") as stream:
        while stream.readline():
            headers = http.client.parse_headers(stream)
            bodies.append(stream.read(int(headers["content-length"])))
    return bodies


def post(server: LiveServer, body: bytes, path: str = "/generate", kind: str = "application/json"):
    sent = head(path, f"Content-Type: {kind}", f"Content-Length: {len(body)}") + body
    return answer_of(connect(server, sent))


def assert_refused(found: tuple[http.client.HTTPResponse, bytes], *statuses: int) -> str:
    answer, content = found
    assert answer.status in statuses, content
    assert len(content) < 5000
    return json.dumps(json.loads(content)["detail"])


# Framing


def chunked(*pieces: bytes, trailer: bytes = b"") -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return head("/generate", "Transfer-Encoding: chunked") + chunks + b"0\r\n" + trailer + b"\r\n"


def test_a_body_in_very_many_chunks_is_refused(server):
    """300,000 chunks of one byte took the event loop 12 s."""
    with connect(server, chunked(*[b" "] * 20_000)) as raw:
        assert_refused(answer_of(raw), 400)
    with connect(server, chunked(*[b" "] * (MAX_SMALL_CHUNKS - 1), HELLO)) as raw:
        assert answer_of(raw)[1] == WHOLE
    with connect(server, chunked(*[b" " * 1024] * 200, *[b" "] * 500, HELLO)) as raw:
        assert answer_of(raw)[1] == WHOLE


def test_chunks_are_counted_for_each_request(server):
    body = chunked(*[b" "] * (MAX_SMALL_CHUNKS - 1), HELLO)
    with connect(server, b"") as raw:
        for _ in range(3):
            raw.sendall(body)
            assert answer_of(raw)[1] == WHOLE


@pytest.mark.parametrize(
    "sent",
    [
        GET + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
        GET + b"a:\r\n" * 30_000 + b"\r\n",
        GET.replace(b"/live", b"/live?" + b"a" * 100_000) + b"\r\n",
        chunked(HELLO, trailer=b"A: b\r\n" * 20_000),
        head("/generate", "Transfer-Encoding: chunked") + b"f" * 40 + b"\r\n",
        head("/generate", "Transfer-Encoding: chunked") + b"1;" + b"a" * 100_000 + b"\r\n",
        head("/generate", "Content-Length: " + "9" * 5000),
        head("/generate", "Content-Length: 5", "Content-Length: 6") + b"hello",
    ],
    ids=["header", "headers", "url", "trailer", "size", "extension", "digits", "lengths"],
)
def test_heads_and_trailers_are_bounded_even_if_they_arrive_at_once(server, sent):
    with connect(server, sent) as raw:
        assert_refused(answer_of(raw), 400)


def test_requests_that_arrive_together_are_answered_in_order(server):
    request = head("/generate", f"Content-Length: {len(HELLO)}") + HELLO
    last = GET + b"Connection: close\r\n\r\n"
    with connect(server, request * 3 + last) as raw:
        assert bodies_of(raw) == [WHOLE, WHOLE, WHOLE, b'{"status": "live"}']


def test_an_http_1_0_request_without_a_length_has_no_body(server):
    with connect(server, head(version="1.0") + HELLO) as raw:
        assert_refused(answer_of(raw), 400)
        assert raw.recv(1) == b""


def test_a_client_that_expects_100_continue_gets_it(server):
    headers = f"Content-Length: {len(HELLO)}", "Expect: 100-continue"
    with connect(server, head("/generate", *headers)) as raw:
        expected = b"HTTP/1.1 100 "
        assert raw.recv(len(expected), socket.MSG_WAITALL) == expected
        while not expected.endswith(b"\r\n\r\n"):
            expected += raw.recv(1)
        raw.sendall(HELLO)
        assert answer_of(raw)[1] == WHOLE


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "A" * 10_000])
def test_every_path_answers_every_method(server, method):
    paths = [route.path.format(name="alice", key="a") for route in server.app.routes]
    assert len(paths) > 12
    for path in paths:
        with connect(server, head(path, method=method)) as raw:
            answer, content = answer_of(raw, method)
        assert answer.status in (200, 404, 405, 426), path  # 426: only a WebSocket
        if answer.status == 405:
            assert answer.getheader("allow")
        assert (content == b"") == (method == "HEAD")


# Contents

NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 4000, "9" * 5000, "true", '"1"']
FIELDS = {
    "/generate": ["temperature", "top_p", "min_p", "top_k", "max_frames", "speaker",
                  "repetition_penalty", "repetition_window"],
    "/v1/conversations/a/interrupt": ["played_ms"],
    "/v1/audio/voices": ["speaker"],
    "/v1/conversations/a/turns": ["speaker"],
}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:9])
@pytest.mark.parametrize("path", FIELDS)
def test_numbers_out_of_range_are_refused(server, path, number):
    for field in FIELDS[path]:
        assert_refused(
            post(server, b'{"text": "a", "%s": %s}' % (field.encode(), number.encode()), path),
            400,
            422,
        )


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.0, 1e2, "1", True])
def test_seeds_are_signed_64_bit_integers(server, seed):
    assert_refused(post(server, json.dumps({"text": "a", "seed": seed}).encode()), 422)
    for good in (2**63 - 1, -(2**63)):
        answer, _ = post(server, json.dumps({"text": "a", "seed": good}).encode())
        assert answer.status == 200


@pytest.mark.parametrize("path", FIELDS)
def test_objects_with_very_many_fields_are_refused(server, path):
    """Each unknown field would become an error, even if it is not shown."""
    for number in (MAX_OBJECT_FIELDS + 1, 5000):
        fields = {f"k{i}": i for i in range(number)}
        assert "fields" in assert_refused(post(server, json.dumps(fields).encode(), path), 422)
        nested = json.dumps({"context": [fields], "recordings": [fields]}).encode()
        assert "fields" in assert_refused(post(server, nested, path), 422)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", b'{"text": "a", "context": [{"speaker": 0, "speaker": 1}]}'),
        ("/v1/audio/voices", b'{"name": "b", "recordings": [{"audio": "A", "audio": "B"}]}'),
        ("/v1/conversations/a/turns", b'{"text": "a", "text": "b"}'),
        ("/v1/conversations/a/interrupt", b'{"played_ms": 1, "played_ms": 2}'),
    ],
)
def test_keys_that_are_given_twice_are_refused_everywhere(server, path, body):
    assert "twice" in assert_refused(post(server, body, path), 422)


@pytest.mark.parametrize(
    "name", ["a" * 60_000, "%00", "%ff%fe", "%2e%2e", "..", "a%0d%0ab", "0" * 60]
)
def test_ids_that_are_none_are_unknown(server, name):
    for path in (f"/v1/audio/voices/{name}", f"/v1/conversations/{name}"):
        for method in ("GET", "DELETE"):
            with connect(server, head(path, method=method)) as raw:
                assert_refused(answer_of(raw), 404, 405)
    long = {"text": "a", "voice": "v" * 100_000}
    assert_refused(post(server, json.dumps(long).encode()), 404)


@pytest.mark.parametrize("name", ["speaker", "text"])
def test_a_turns_fields_are_no_files(server, name):
    part = '--x\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\n\r\n1\r\n--x--'
    kind = "multipart/form-data; boundary=x"
    answer = post(server, (part % name).encode(), "/v1/conversations/a/turns", kind)
    assert_refused(answer, 422)


def test_long_numbers_in_long_bodies_are_refused(server):
    body = b'{"name": "b", "recordings": [' + (b"9" * 4200 + b",") * 100 + b"1]}"
    assert "digits" in assert_refused(post(server, body, "/v1/audio/voices"), 400)


def test_contexts_of_very_many_segments_are_refused(server):
    entry = b'{"speaker": 0, "text": "x", "codes": [[1]]},'
    for number in (100, MAX_SEGMENTS + 1):
        body = b'{"text": "a", "context": [' + (entry * number)[:-1] + b"]}"
        said = assert_refused(post(server, body), 422)
        assert ("at most 4096 fit" in said) == (number > MAX_SEGMENTS)


def test_what_was_loaded_is_not_looked_at_again(tmp_path):
    """A full garbage collection of it stops all threads for 0.2 s."""
    after = "import gc; engine.cache_counts = lambda: {'frozen': gc.get_freeze_count()}"
    with ProcessServer(tmp_path / "log", after=after) as server:
        answer = server.request("GET", "/health")
        assert json.load(answer)["cache"]["frozen"] > 10_000


@pytest.mark.parametrize("path", ["/generate", "/v1/audio/speech"])
@pytest.mark.parametrize("name", ["sample_rate", "max_frames", "seed", "speaker", "format"])
def test_no_error_echoes_a_long_value(server, path, name):
    number = "7" * 4200
    text = "input" if path.startswith("/v1") else "text"
    value = f'"{number}"' if name == "format" else number
    answer, content = post(server, f'{{"{text}": "hello", "{name}": {value}}}'.encode(), path)
    assert 400 <= answer.status < 500
    assert len(content) < 2000
