"""The clients of examples/ speak with a server."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine, expected_pcm
from live_server import LiveServer
from vox_serve.audio import wav_file, wav_header
from vox_serve.long_form import LongForm

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


def node_with_websocket() -> list[str]:
    """A command of Node with a WebSocket; empty if there is none."""
    for flags in ([], ["--experimental-websocket"]):
        command = ["node", *flags]
        if (
            shutil.which("node")
            and not subprocess.run([*command, "-e", "WebSocket"], capture_output=True).returncode
        ):
            return command
    return []


def test_node_speaks_a_text_that_is_being_written(tmp_path):
    if not (node := node_with_websocket()):
        pytest.skip("needs node 20 or newer, which has WebSocket")
    with LiveServer(LongForm(FakeEngine(), 20), split_chars=20) as server:
        done = subprocess.run(
            [*node, str(EXAMPLES / "live_text.mjs"), "a.pcm", f"http://127.0.0.1:{server.port}"],
            cwd=tmp_path,
            input="Hello there. How are you?",
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Hello there.", "How are you?"]
    assert (tmp_path / "a.pcm").stat().st_size == 2 * len(expected_pcm("Hello there.", 3))


SOUND = """
import threading, time

class RawOutputStream:  # plays ten times as fast as a device
    def __init__(self, callback, **options):
        self.callback = callback
        self.thread = threading.Thread(target=self.play, daemon=True)

    def start(self):
        self.thread.start()

    def play(self):
        with open("played.pcm", "wb", buffering=0) as file:
            while True:
                out = bytearray(3840)
                self.callback(out, 1920, None, None)
                if any(out):
                    file.write(out)
                time.sleep(0.008)

    def stop(self):
        pass
"""


def start_agent(folder: Path, server: LiveServer) -> subprocess.Popen:
    pytest.importorskip("websockets", reason="websockets is not installed")
    (folder / "sounddevice.py").write_text(SOUND)
    url = f"ws://127.0.0.1:{server.port}/v1/audio/speech/stream"
    return subprocess.Popen(
        [*call("agent_loop.py"), url],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_an_agent_talks(tmp_path):
    with (
        LiveServer(LongForm(FakeEngine(), 100), split_chars=100) as server,
        start_agent(tmp_path, server) as agent,
    ):
        said, _ = agent.communicate("Hello there.\n", TIMEOUT_S)
    assert agent.returncode == 0
    assert said == "  You said: Hello there.\n"
    assert (tmp_path / "played.pcm").stat().st_size == 3 * 3840


def test_an_agent_is_interrupted(tmp_path):
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)
    with (
        LiveServer(LongForm(engine, 100), split_chars=100) as server,
        start_agent(tmp_path, server) as agent,
    ):
        agent.stdin.write("first.\n")
        agent.stdin.flush()
        assert agent.stdout.readline() == "  You said: first.\n"
        engine.num_frames = 3
        agent.stdin.write("second.\n")
        agent.stdin.flush()
        assert agent.stdout.readline() == "  You said: second.\n"
        agent.communicate(timeout=TIMEOUT_S)
    assert agent.returncode == 0
