"""Formats over real sockets: first bytes, clients that leave or do not read, OpenAI's client."""

import http.client
import json
import socket
from base64 import b64decode

import pytest

from encoded import streamed, whole
from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine
from live_server import LiveServer, wait_until
from vox_serve import job as job_module
from vox_serve.formats import FORMATS

SPEECH = "/v1/audio/speech"


def ask(server: LiveServer, **fields) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.request("POST", SPEECH, json.dumps({"input": "hello", **fields}))
    return connection.getresponse()


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_come_as_speech_is_made_and_a_client_that_leaves_ends_it(name):
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)
    with LiveServer(engine) as server:
        answer = ask(server, response_format=name)
        assert answer.getheader("transfer-encoding") == "chunked"
        # The utterance never ends, so these were sent during generation.
        assert len(answer.read(5000)) == 5000
        answer.close()
        assert engine.saw_abort.wait(TIMEOUT_S)


def test_a_client_that_does_not_read_stops_its_speech(monkeypatch):
    monkeypatch.setattr(job_module, "MAX_AHEAD_BYTES", 200_000)
    monkeypatch.setattr(job_module, "RESUME_BYTES", 100_000)
    engine = FakeEngine(num_frames=ENDLESS)
    with LiveServer(engine, policy="fifo") as server:
        fields = {"input": "hello", "response_format": "flac", "max_frames": 2048}
        body = json.dumps(fields).encode()
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        raw.connect(("127.0.0.1", server.port))
        head = f"POST {SPEECH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        wait_until(lambda: any(job.is_ahead for job in server.runner._jobs.values()))
        assert server.runner.unread_bytes < 250_000
        raw.close()
        assert engine.saw_abort.wait(TIMEOUT_S)
        wait_until(lambda: server.runner.unread_bytes == 0)


def test_a_whole_answer_waits_as_the_bytes_that_are_sent():
    with LiveServer(FakeEngine(num_frames=600)) as server:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(TIMEOUT_S)
        raw.connect(("127.0.0.1", server.port))
        fields = {"input": "hello", "response_format": "flac", "max_frames": 1000}
        body = json.dumps(fields | {"streaming": False})
        head = f"POST {SPEECH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(f"{head}{body}".encode())
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        assert server.runner.unread_bytes > 0
        assert answer.read() == whole("hello", 600, "flac")
        wait_until(lambda: server.runner.unread_bytes == 0)


@pytest.mark.parametrize("name", ["wav", "mp3"])
def test_http_1_0_gets_an_unchunked_body(name):
    body = json.dumps({"input": "hello", "response_format": name}).encode()
    with LiveServer(FakeEngine()) as server:
        raw = socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S)
        head = f"POST {SPEECH} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        answer = b""
        while piece := raw.recv(65_536):
            answer += piece
        raw.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert content == streamed("hello", 3, name)


@pytest.fixture
def openai_client():
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    with LiveServer(FakeEngine()) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(api_key="none", base_url=url, max_retries=0) as client:
            yield openai, client


@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
def test_openais_own_client(name, openai_client, tmp_path):
    _, client = openai_client
    fields = {"model": "gpt-4o-mini-tts", "voice": "alloy", "input": "hello"}
    fields |= {"response_format": name, "instructions": "Speak cheerfully."}
    expected = streamed("hello", 3, name)
    assert client.audio.speech.create(**fields).content == expected
    path = tmp_path / "speech"
    with client.audio.speech.with_streaming_response.create(**fields) as response:
        response.stream_to_file(path)
    assert path.read_bytes() == expected
    with client.audio.speech.with_streaming_response.create(
        **fields, stream_format="sse"
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    audio = b"".join(b64decode(event["audio"]) for event in events[:-1])
    assert (audio, events[-1]["type"]) == (expected, "speech.audio.done")


def test_errors_in_openais_own_client(openai_client):
    openai, client = openai_client
    fields = {"model": "tts-1", "voice": "alloy", "input": "hello"}
    with pytest.raises(openai.BadRequestError, match="ulaw") as error:
        client.audio.speech.create(**fields | {"response_format": "m4a"})
    assert error.value.param == "response_format"
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.audio.speech.create(**fields | {"voice": "nobody"})
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "voxkern"
