"""OpenAI's own clients: the examples, and the programs of docs/openai.md, get the speech."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import node_packages
from encoded import streamed
from fake_engine import TIMEOUT_S, FakeEngine, expected_pcm
from forked_python import python
from live_server import LiveServer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "openai.md").read_text()

NO_NODE = node_packages.why_missing("openai")
needs_node_client = pytest.mark.skipif(bool(NO_NODE), reason=str(NO_NODE))


@pytest.fixture
def server():
    with LiveServer(FakeEngine()) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """A folder in which Node finds the package `openai`."""
    if node_packages.MODULES.is_dir():
        (tmp_path / "node_modules").symlink_to(node_packages.MODULES)
    return tmp_path


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=2 * TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def block(kind: str, server: LiveServer) -> str:
    """The program of the page in a language, for a server of a test."""
    (text,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
    assert "localhost:8000" in text
    return text.replace("localhost:8000", f"127.0.0.1:{server.port}")


@pytest.mark.parametrize("name", ["mp3", "opus", "flac", "wav"])
def test_the_python_example(name, server, folder):
    pytest.importorskip("openai", reason="the openai package is not installed")
    url = f"http://127.0.0.1:{server.port}"
    said = run(
        folder, sys.executable, str(EXAMPLES / "openai_client.py"), "hello", f"a.{name}", url
    )
    assert said.startswith("first bytes after ")
    assert (folder / f"a.{name}").read_bytes() == streamed("hello", 3, name)


@needs_node_client
@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "pcm"])
def test_the_node_example(name, server, folder):
    shutil.copy(EXAMPLES / "openai_client.mjs", folder)
    url = f"http://127.0.0.1:{server.port}"
    said = run(folder, "node", "openai_client.mjs", "hello", f"a.{name}", url)
    assert said.startswith("first bytes after ")
    assert (folder / f"a.{name}").read_bytes() == streamed("hello", 3, name)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_documented_command(server, folder):
    run(folder, "sh", "-c", block("sh", server))
    assert (folder / "hello.mp3").read_bytes() == streamed("Hello there.", 3, "mp3")


def test_the_documented_python_program(server, folder):
    pytest.importorskip("openai", reason="the openai package is not installed")
    program = block("python", server)
    assert "..." in program
    program = program.replace("...", "sys.stdout.buffer.write(chunk)")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}"], capture_output=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == streamed("Hello there.", 3, "opus")


@needs_node_client
def test_the_documented_node_program(server, folder):
    (folder / "program.mjs").write_text(block("js", server))
    done = subprocess.run(["node", folder / "program.mjs"], capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout == streamed("Hello there.", 3, "mp3")


@needs_node_client
def test_events_and_errors_in_the_node_client(server, folder):
    program = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const fields = { model: "tts-1", voice: "alloy", input: "hello", response_format: "pcm" };
const answer = await client.audio.speech.create({ ...fields, stream_format: "sse" });
const events = (await answer.text()).trim().split("\\n\\n").map((e) => JSON.parse(e.slice(6)));
const audio = events.slice(0, -1).map((e) => Buffer.from(e.audio, "base64"));
const error = await client.audio.speech
  .create({ ...fields, response_format: "m4a" })
  .catch((error) => error);
console.log(JSON.stringify({
  audio: Buffer.concat(audio).toString("hex"),
  last: events.at(-1).type,
  error: [error instanceof OpenAI.BadRequestError, error.param, error.message],
  models: (await client.models.list()).data.map((model) => model.id),
}));
"""
    (folder / "events.mjs").write_text(program)
    found = json.loads(run(folder, "node", "events.mjs", f"http://127.0.0.1:{server.port}/v1"))
    assert bytes.fromhex(found["audio"]) == expected_pcm("hello", 3)
    assert found["last"] == "speech.audio.done"
    is_bad_request, param, message = found["error"]
    assert (is_bad_request, param) == (True, "response_format")
    assert "ulaw" in message
    assert found["models"] == ["demo"]


@pytest.mark.slow
def test_the_example_without_a_server(tmp_path):
    said = run(tmp_path, *python(), str(EXAMPLES / "python_api.py"))
    assert re.search(r"hello.wav: 0\.[5-9]\d s|hello.wav: [1-2]\.\d+ s", said)
    assert "streamed " in said
    assert (tmp_path / "hello.wav").stat().st_size > 20_000
