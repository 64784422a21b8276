"""The server behind a real nginx: streams arrive as they are made, below a path, WebSockets too."""

import http.client
import json

import pytest

from encoded import streamed
from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine, expected_pcm
from live_client import LiveClient, connect
from live_server import LiveServer
from nginx import NGINX, nginx
from vox_serve.audio import wav_header
from vox_serve.long_form import LongForm

pytestmark = pytest.mark.skipif(not NGINX, reason="needs nginx (Debian's package: nginx-light)")


def get(port: int, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("GET", path)
    return connection.getresponse()


def post(port: int, path: str, **fields) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})
    return connection.getresponse()


@pytest.mark.parametrize("name", ["wav", "pcm", "mp3", "opus", "aac", "flac", "ulaw"])
def test_a_stream_is_not_held_back(name, tmp_path):
    """The first bytes pass nginx while the speech is endless, and a client that leaves ends it."""
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.01)
    with LiveServer(engine) as server, nginx(tmp_path, server.port) as port:
        answer = post(port, "/v1/audio/speech", input="hello", response_format=name)
        assert answer.status == 200
        assert answer.getheader("Cache-Control") == "no-store"
        assert len(answer.read(2000)) == 2000
        answer.close()
        assert engine.saw_abort.wait(TIMEOUT_S)


@pytest.mark.parametrize("path", ["/tts", "/bare", ""])
def test_below_a_path(path, tmp_path):
    settings = {"root_path": path} if path else {}
    with LiveServer(FakeEngine(), **settings) as server, nginx(tmp_path, server.port) as port:
        page = get(port, f"{path}/")
        assert (page.status, b"<title>VoxKern" in page.read()) == (200, True)
        assert get(port, f"{path}/page/app.js").status == 200
        answer = post(port, f"{path}/generate", text="hello", streaming=True)
        assert answer.read() == wav_header(None) + expected_pcm("hello", 3)
        answer = post(port, f"{path}/v1/audio/speech", input="hello")
        assert answer.read() == streamed("hello", 3, "mp3")
        schema = json.load(get(port, f"{path}/openapi.json"))
        assert schema.get("servers", [{"url": ""}]) == [{"url": path}]


def test_a_websocket(tmp_path):
    with (
        LiveServer(LongForm(FakeEngine(), 24), split_chars=24, root_path="/live") as server,
        nginx(tmp_path, server.port) as port,
        connect(f"ws://127.0.0.1:{port}/live/v1/audio/speech/stream", proxy=None) as socket,
    ):
        client = LiveClient(socket)
        client.send("session", seed=5)
        assert client.event()["type"] == "ready"
        sentences = ["Hello there.", "How are you?"]
        assert client.speak([" ".join(sentences)])["samples"] == 2 * 3 * 1920
        whole = post(port, "/live/generate", text="\n\n".join(sentences), seed=5).read()
        assert client.audio[1] == whole[44:]
