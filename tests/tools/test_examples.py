"""The clients of examples/ speak with a server."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fake_engine import TIMEOUT_S, FakeEngine, expected_pcm
from live_server import LiveServer
from vox_serve.audio import wav_file, wav_header

EXAMPLES = Path(__file__).parents[2] / "examples"
WHOLE = wav_file(expected_pcm("Hello there.", 3))
STREAMED = wav_header(None) + expected_pcm("Hello there.", 3)


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"{program} is not installed")


@pytest.fixture
def server():
    with LiveServer(FakeEngine()) as server:
        yield server


def run(folder: Path, server: LiveServer, *command: str, code: int = 0) -> str:
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{server.port}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def call(name: str, *arguments: str) -> list[str]:
    interpreter = {".py": sys.executable, ".mjs": "node", ".sh": "sh"}[Path(name).suffix]
    return [interpreter, str(EXAMPLES / name), *arguments]


CLIENTS = [
    pytest.param("speak.mjs", WHOLE, marks=needs("node")),
    pytest.param("stream.mjs", STREAMED, marks=needs("node")),
    ("stream_http.py", STREAMED),
    ("stream_requests.py", STREAMED),
]


@pytest.mark.parametrize(("name", "expected"), CLIENTS)
def test_a_client_saves_the_speech(name, expected, server, tmp_path):
    if name == "stream_requests.py":
        pytest.importorskip("requests", reason="requests is not installed")
    said = run(tmp_path, server, *call(name, "Hello there.", "hello.wav"))
    assert (tmp_path / "hello.wav").read_bytes() == expected
    assert "hello.wav" in said


@needs("node")
def test_a_refusal_is_shown(server, tmp_path):
    said = run(tmp_path, server, *call("stream.mjs", " ", "hello.wav"), code=1)
    assert "422" in said
    assert not (tmp_path / "hello.wav").exists()


def test_a_busy_server_is_asked_again(server, tmp_path):
    pytest.importorskip("requests", reason="requests is not installed")
    server.runner.draining = True
    command = call("stream_requests.py", "Hello there.", "hello.wav")
    url = f"http://127.0.0.1:{server.port}"
    with subprocess.Popen(
        [*command, url], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as client:
        assert re.match(r"busy: trying again in \d+ s", client.stdout.readline())
        server.runner.draining = False
        assert "hello.wav" in client.stdout.read()
    assert (tmp_path / "hello.wav").read_bytes() == STREAMED


@needs("curl")
def test_curl(server, tmp_path):
    said = run(tmp_path, server, *call("curl.sh"))
    pcm = expected_pcm("Hello there.", 3, seed=1)
    assert (tmp_path / "whole.wav").read_bytes() == wav_file(pcm)
    assert (tmp_path / "stream.wav").read_bytes() == wav_header(None) + pcm
    assert "x-finish-reason: stop" in said.lower()
    assert '"speaker"' in said
