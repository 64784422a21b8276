"""The page's modules that need no browser, in Node."""

import ast
import json
import shlex
import shutil
import subprocess

import numpy as np
import pytest

from vox_serve import page
from vox_serve.audio import wav_file, wav_header
from vox_serve.provenance import info_chunk, note_of

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")

FOLDER = page.FILES["wav.js"].parent
BODY = {"text": 'It\'s "so" — $HOME `x` \\ ${y}\n😀', "speaker": 1, "streaming": True, "top_p": 0.5}


def in_node(tmp_path, code: str, given: object = None):
    """Run a module and return the JSON that it prints; `given` is a value in it."""
    for name in ("wav.js", "snippets.js"):
        (tmp_path / name).with_suffix(".mjs").write_text((FOLDER / name).read_text())
    script = tmp_path / "test.mjs"
    script.write_text(f"const given = {json.dumps(given)};\n{code}")
    done = subprocess.run([NODE, script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("piece_bytes", [1, 7, 44, 1000, 10**6])
@pytest.mark.parametrize("kind", ["whole", "streamed", "with chunks"])
def test_a_wav_in_pieces_gives_its_samples(tmp_path, piece_bytes, kind):
    samples = np.arange(-300, 300, dtype="<i2") * 100
    pcm = samples.tobytes()
    data = wav_header(None) + pcm if kind == "streamed" else wav_file(pcm, 24_000)
    if kind == "with chunks":
        extra = b"LIST" + (7).to_bytes(4, "little") + b"INFOabc\0"
        data = data[:36] + extra + data[36:] + b"LIST" + (2).to_bytes(4, "little") + b"zz"
    code = """
import { WavReader } from "./wav.mjs";
const reader = new WavReader();
const bytes = Uint8Array.from(given.data);
const found = [];
for (let i = 0; i < bytes.length; i += given.size)
  found.push(...reader.push(bytes.slice(i, i + given.size)));
console.log(JSON.stringify({ found, rate: reader.rate }));
"""
    got = in_node(tmp_path, code, {"data": list(data), "size": piece_bytes})
    assert got["found"] == samples.tolist()
    assert got["rate"] == 24_000


def test_a_written_wav_equals_the_servers(tmp_path):
    samples = [0, 1, -1, 32767, -32768]
    code = """
import { toFloat, toInt16, wavFile } from "./wav.mjs";
const samples = toInt16(toFloat(Int16Array.from(given)));
const file = wavFile([samples.slice(0, 2), samples.slice(2)], 24000);
console.log(JSON.stringify([...new Uint8Array(await file.arrayBuffer())]));
"""
    assert bytes(in_node(tmp_path, code, samples)) == wav_file(
        np.array(samples, "<i2").tobytes(), 24_000
    )


@pytest.mark.parametrize("model", ["demo", "demo1"])
def test_a_download_is_marked_like_the_servers_files(tmp_path, model):
    note = note_of(model)
    code = """
import { wavFile } from "./wav.mjs";
const file = wavFile([new Int16Array(2)], 24000, given);
console.log(JSON.stringify([...new Uint8Array(await file.arrayBuffer())]));
"""
    file = bytes(in_node(tmp_path, code, note))
    assert file[48:] == info_chunk(note)
    assert int.from_bytes(file[4:8], "little") == len(file) - 8


def snippet(tmp_path, language: str, with_key: bool = False) -> str:
    code = f"""
import {{ snippets }} from "./snippets.mjs";
const key = {json.dumps(with_key)};
console.log(JSON.stringify(snippets.{language}("http://localhost:8000/generate", given, key)));
"""
    return in_node(tmp_path, code, BODY)


def test_the_curl_command_sends_the_request(tmp_path):
    words = shlex.split(snippet(tmp_path, "curl"))
    assert words[:3] == ["curl", "-N", "http://localhost:8000/generate"]
    assert json.loads(words[words.index("-d") + 1]) == BODY


def test_the_python_program_sends_the_request(tmp_path):
    tree = ast.parse(snippet(tmp_path, "python", with_key=True))
    values = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert ast.literal_eval(values["body"]) == BODY


def test_the_javascript_program_sends_the_request(tmp_path):
    program = snippet(tmp_path, "javascript", with_key=True)
    check = """
globalThis.fetch = async (url, options) => {
  console.log(JSON.stringify({ url, body: JSON.parse(options.body), headers: options.headers }));
  process.exit(0);
};
"""
    (tmp_path / "sent.mjs").write_text(check + program)
    environment = {"VOX_SERVE_API_KEY": "abc"}
    done = subprocess.run(
        [NODE, tmp_path / "sent.mjs"], capture_output=True, text=True, check=True, env=environment
    )
    sent = json.loads(done.stdout)
    assert (sent["url"], sent["body"]) == ("http://localhost:8000/generate", BODY)
    assert sent["headers"]["Authorization"] == "Bearer abc"
