"""Files that are dropped on the page, code that is copied from it, the example for browsers."""

import base64
import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import web_driver
from fake_engine import FRAME_SAMPLES, TIMEOUT_S, FakeEngine, expected_pcm
from live_server import LiveServer
from recordings import tone
from vox_serve.audio import wav_header
from vox_serve.long_form import LongForm
from web_driver import Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(web_driver.why_missing()), reason=str(web_driver.why_missing())),
]

LIVE_DOCS = Path(__file__).parents[2] / "docs" / "live.md"

DROP = """
const [data, name, kind] = args;
const file = new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type: kind });
const dataTransfer = new DataTransfer();
dataTransfer.items.add(file);
for (const type of ["dragover", "drop"])
  document.querySelector("#record").dispatchEvent(
    new DragEvent(type, { dataTransfer, bubbles: true, cancelable: true }));
"""

COPIED = """
navigator.clipboard.writeText = async (text) => { window.copied = text; };
document.querySelector(`[data-copy=${args[0]}]`).click();
return window.copied;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with contextlib.closing(Browser(tmp_path_factory.mktemp("profile"))) as browser:
        yield browser


def visit(browser: Browser, server: LiveServer) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.until("return document.querySelector('#voice').options.length")


def test_a_voice_is_made_of_a_file_that_is_dropped(browser):
    engine = FakeEngine(num_frames=3)
    with LiveServer(engine) as server:
        visit(browser, server)
        browser.click("#tab-voices")
        data = base64.b64encode(tone(seconds=2.0)).decode()
        browser.run(DROP, data, "anna.wav", "audio/wav")
        note = "return document.querySelector('#voice-note').textContent"
        assert browser.run(note) == "anna.wav is taken."
        assert not browser.run("return document.querySelector('#preview').hidden")
        browser.type("#transcript", "beep")
        browser.type("#name", "anna")
        browser.click("#new-voice .main")  # consent is missing
        assert browser.run("return document.querySelector('#voice').options.length") == 2
        browser.click("#consent")
        browser.click("#new-voice .main")
        browser.until("return document.querySelector('#voice').value === 'anna'")
        (voice,) = server.app.state.voices.store.voices()
        assert voice.name == "anna"


@pytest.mark.parametrize("language", ["curl", "python", "javascript"])
def test_copied_code_gets_the_speech(language, browser, tmp_path):
    command = {
        "curl": ["sh", "speech.txt"],
        "python": [sys.executable, "speech.txt"],
        "javascript": ["node", "speech.mjs"],
    }[language]
    for program in (command[0], *(["curl"] if language == "curl" else [])):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    engine = FakeEngine(num_frames=3)
    with LiveServer(engine, api_key="secret") as server:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.run("document.querySelector('#settings').open = true")
        browser.type("#key", "secret\ue004")  # Tab
        browser.until("return document.querySelector('#voice').options.length")
        browser.type("#text", 'It\'s "so", $HOME `x` \\ é\ue007over.')
        browser.type("#seed", "7")
        browser.run("document.querySelector('#code').open = true")
        code = browser.run(COPIED, language)
        assert "secret" not in code
        (tmp_path / command[1]).write_text(code)
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "VOX_SERVE_API_KEY": "secret"},
        )
        assert done.returncode == 0, done.stderr
        browser.run("sessionStorage.clear()")
    text = engine.requests[-1].text
    assert text == 'It\'s "so", $HOME `x` \\ é\nover.'
    pcm = expected_pcm(text, 3, seed=7)
    assert (tmp_path / "speech.wav").read_bytes() == wav_header(None) + pcm


def test_the_example_for_browsers_in_the_documentation(browser):
    (code,) = re.findall(r"```js\n(.*?)```", LIVE_DOCS.read_text(), re.DOTALL)
    assert code.count("ws://localhost:8000") == 1
    with LiveServer(LongForm(FakeEngine(num_frames=3), 24), split_chars=24) as server:
        visit(browser, server)
        code = code.replace("localhost:8000", f"127.0.0.1:{server.port}")
        played = browser.run(
            f"""
            let samples = 0, finish;
            const finished = new Promise((resolve) => (finish = resolve));
            const start = AudioBufferSourceNode.prototype.start;
            AudioBufferSourceNode.prototype.start = function (...when) {{
              samples += this.buffer.length;
              return start.apply(this, when);
            }};
            console.log = (event) => event.type === "turn.done" && finish();
            const answer = (async function* () {{
              for (const word of "Hello there. How are you?".split(" ")) yield `${{word}} `;
            }})();
            {code}
            await finished;
            return samples;
            """
        )
        assert played == 2 * 3 * FRAME_SAMPLES
