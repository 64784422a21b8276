"""The page in a real Chromium: the samples that its audio graph plays, and failures."""

import contextlib
import json
import urllib.request

import numpy as np
import pytest

import web_driver
from audio_decoding import with_av
from fake_engine import ENDLESS, FRAME_SAMPLES, TIMEOUT_S, FakeEngine, expected_audio
from live_server import LiveServer
from process_server import ProcessServer
from vox_serve.audio import pcm16
from web_driver import Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(web_driver.why_missing()), reason=str(web_driver.why_missing())),
]

STATS = "const { player } = await import('/page/app.js'); return player.stats;"
TOO_WIDE = """
const all = [...document.querySelectorAll("body *")];
return all.filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.outerHTML);
"""
NOTE = "return document.querySelector('#note').textContent;"
STATE = "return document.querySelector('#server').dataset.state === args[0];"


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory):
    with contextlib.closing(Browser(tmp_path_factory.mktemp("profile"))) as browser:
        yield browser


@pytest.fixture
def browser(shared_browser):
    """A browser whose console must stay silent."""
    shared_browser.complaints()
    yield shared_browser
    assert shared_browser.complaints() == []
    shared_browser.open("about:blank")


def visit(browser: Browser, port: int) -> None:
    browser.open(f"http://127.0.0.1:{port}/")
    browser.until(STATE, "ready")
    browser.until("return document.querySelector('#voice').options.length")


def start(browser: Browser, text: str) -> None:
    browser.type("#text", text)
    browser.click("#speak .main")


def used_seed(browser: Browser) -> int:
    """The seed that the page drew."""
    return int(browser.text("#used-seed"))


def assert_played(stats: dict, text: str, num_frames: int, seed: int) -> None:
    """The audio graph played exactly these samples, or others of the same number and energy."""
    wanted = pcm16(expected_audio(text, num_frames, seed)).astype(np.float64) / 32768
    assert stats["done"]
    assert stats["played"] == len(wanted)
    assert stats["squares"] == pytest.approx((wanted**2).sum(), rel=1e-6)


def test_a_text_is_spoken_to_its_end(browser):
    with LiveServer(FakeEngine(num_frames=20, step_s=0.005)) as server:
        visit(browser, server.port)
        start(browser, "hello")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        assert_played(browser.run(STATS), "hello", 20, used_seed(browser))
        browser.click("#download")
        file = browser.downloaded("speech.wav")
        pcm = pcm16(expected_audio("hello", 20, used_seed(browser))).tobytes()
        at = file.index(b"data")
        assert int.from_bytes(file[at + 4 : at + 8], "little") == len(pcm)
        assert file[at + 8 : at + 8 + len(pcm)] == pcm
        assert int.from_bytes(file[4:8], "little") == len(file) - 8
        assert b"AI-generated" in file
        assert browser.text("#first").endswith(" ms")


def test_sound_comes_before_the_end_and_stop_cancels(browser):
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.01)
    with LiveServer(engine) as server:
        visit(browser, server.port)
        start(browser, "hello")
        playing = browser.until(STATS, holds=lambda stats: stats["played"] > 0)
        assert playing["squares"] > 0
        assert not playing["done"]
        browser.click("#stop")
        assert engine.saw_abort.wait(TIMEOUT_S)
        browser.until(NOTE, holds=lambda note: note == "Stopped.")
        stopped = browser.until(STATS, holds=lambda stats: stats["done"])
        assert browser.run(STATS) == stopped
        engine.num_frames = 3
        start(browser, "again")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        assert_played(browser.run(STATS), "again", 3, used_seed(browser))


def test_a_slow_server_makes_gaps_but_loses_nothing(browser):
    with LiveServer(FakeEngine(num_frames=20, step_s=0.11)) as server:
        visit(browser, server.port)
        start(browser, "slow")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        stats = browser.run(STATS)
        assert stats["underruns"] > 0
        assert_played(stats, "slow", 20, used_seed(browser))
        assert browser.text("#gaps") == str(stats["underruns"])


def test_a_browser_without_sound_says_so(browser):
    with LiveServer(FakeEngine()) as server:
        visit(browser, server.port)
        browser.run(
            """window.AudioContext = class extends AudioContext {
                 constructor(options) { super(options); this.suspend(); }
                 resume() { return new Promise(() => {}); }
               };"""
        )
        start(browser, "hello")
        browser.until(NOTE, holds=lambda note: "no sound" in note)
        browser.click("#stop")
        browser.until(NOTE, holds=lambda note: note == "Stopped.")


def test_a_voice_can_be_listened_to(browser):
    with LiveServer(FakeEngine(num_frames=4)) as server:
        visit(browser, server.port)
        browser.click("#tab-voices")
        browser.click("#voice-list [aria-label='Listen: Speaker 1']")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        stats = browser.run(STATS)
        assert stats["played"] == 4 * FRAME_SAMPLES
        assert stats["squares"] > 0


def test_the_keyboard_suffices(browser):
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.01)
    with LiveServer(engine) as server:
        visit(browser, server.port)
        browser.type("#text", "hello\ue009\ue007\ue000")  # Control, Enter, all up
        browser.until(STATS, holds=lambda stats: stats["played"] > 0)
        browser.type("#text", "\ue00c", clear=False)  # Escape
        assert engine.saw_abort.wait(TIMEOUT_S)
        browser.until(NOTE, holds=lambda note: note == "Stopped.")
        browser.type("#tab-speak", "\ue014\ue014", clear=False)  # Right, twice
        assert browser.run("return document.activeElement.id") == "tab-voices"
        assert browser.run("return document.querySelector('#speak').hidden")


def test_two_tabs_at_once(browser):
    with LiveServer(FakeEngine(num_frames=30, step_s=0.005)) as server:
        first = browser.tab()
        visit(browser, server.port)
        start(browser, "one")
        second = browser.new_tab()
        try:
            visit(browser, server.port)
            start(browser, "two")
            browser.until(NOTE, holds=lambda note: note == "Done.")
            assert_played(browser.run(STATS), "two", 30, used_seed(browser))
            browser.switch_to(first)
            browser.until(NOTE, holds=lambda note: note == "Done.")
            assert_played(browser.run(STATS), "one", 30, used_seed(browser))
        finally:
            browser.switch_to(second)
            browser.close_tab()
            browser.switch_to(first)


def test_a_server_that_goes_away_and_returns(shared_browser, tmp_path):
    browser = shared_browser
    endless = ProcessServer(tmp_path / "first.log", "num_frames=ENDLESS, step_s=0.01")
    with endless:
        visit(browser, endless.port)
        start(browser, "hello")
        browser.until(STATS, holds=lambda stats: stats["played"] > 0)
    browser.until(NOTE, holds=lambda note: note.startswith("The speech was cut"))
    browser.until(STATE, "away")
    assert browser.text("#server") == "The server does not answer. Trying again …"
    browser.click("#speak .main")
    browser.until(NOTE, holds=lambda note: note == "The server does not answer.")
    with ProcessServer(tmp_path / "second.log", "num_frames=5", port=endless.port):
        browser.until(STATE, "ready")
        start(browser, "back")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        assert_played(browser.run(STATS), "back", 5, used_seed(browser))
    browser.open("about:blank")
    browser.complaints()


def test_a_key_is_asked_for_and_sent(shared_browser):
    browser = shared_browser
    with LiveServer(FakeEngine(num_frames=3), api_key="secret") as server:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.until(STATE, "ready")
        start(browser, "hello")
        browser.until(NOTE, holds=lambda note: "API key" in note)
        browser.until("return document.activeElement.id === 'key'")
        browser.type("#key", "secret\ue004")  # Tab: leaves the field
        browser.until("return document.querySelector('#voice').options.length")
        browser.click("#speak .main")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        assert_played(browser.run(STATS), "hello", 3, used_seed(browser))
        assert browser.run("return localStorage.length") == 0
        browser.run("sessionStorage.clear()")
    browser.open("about:blank")
    browser.complaints()


def test_a_conversation_and_an_interruption(browser):
    engine = FakeEngine(num_frames=5, step_s=0.01)
    with LiveServer(engine) as server:
        visit(browser, server.port)
        browser.click("#tab-talk")
        browser.type("#turn", "first turn")
        browser.click("#talk .main")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        browser.until("return document.querySelectorAll('#turns li').length === 1")
        assert "Speaker 0, 0.4 s" in browser.text("#turns")
        engine.num_frames = ENDLESS
        browser.type("#turn", "a second turn that is too long")
        browser.click("#talk .main")
        browser.until(STATS, holds=lambda stats: stats["played"] > 0 and not stats["done"])
        browser.click("#stop")
        browser.until(NOTE, holds=lambda note: note.startswith("Interrupted after"))
        key = browser.run("return sessionStorage['voxkern.conversation']")
        url = f"http://127.0.0.1:{server.port}/v1/conversations/{key}"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            turns = json.load(answer)["turns"]
        assert [turn["speaker"] for turn in turns][:2] == [0, 1][: len(turns)]
        assert len(browser.run("return [...document.querySelectorAll('#turns li')]")) == len(turns)
        browser.open(f"http://127.0.0.1:{server.port}/")  # a reload keeps the conversation
        browser.until(
            "return document.querySelectorAll('#turns li').length === args[0]", len(turns)
        )


def test_a_voice_is_recorded_used_and_deleted(browser):
    engine = FakeEngine(num_frames=3)
    with LiveServer(engine) as server:
        visit(browser, server.port)
        browser.click("#tab-voices")
        browser.click("#record")
        browser.until("return /[3-9] s/.test(document.querySelector('#record').textContent)")
        browser.click("#record")
        browser.until("return !document.querySelector('#preview').hidden")
        browser.type("#transcript", "beep beep")
        browser.type("#name", "robot")
        browser.click("#new-voice .main")
        assert browser.run("return document.querySelector('#voice').options.length") == 2
        browser.click("#consent")
        browser.click("#new-voice .main")
        browser.until("return document.querySelector('#voice').value === 'robot'")
        browser.click("#tab-speak")
        start(browser, "hello")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        assert engine.requests[-1].context
        browser.click("#tab-voices")
        browser.run("window.confirm = () => true")
        browser.click("#voice-list [aria-label='Delete: robot']")
        browser.until("return document.querySelector('#voice').options.length === 2")


def test_a_refused_turn_goes_away(browser):
    with LiveServer(FakeEngine(), max_text_chars=20) as server:
        visit(browser, server.port)
        browser.click("#tab-talk")
        browser.type("#turn", "a turn that is too long for this server")
        browser.click("#talk .main")
        browser.until(NOTE, holds=lambda note: "20" in note)
        browser.until("return document.querySelectorAll('#turns li').length === 0")
        assert browser.run("return document.querySelector('#turn').value").startswith("a turn")
    complaints = browser.complaints()
    assert all("422" in line or "404" in line for line in complaints), complaints


def test_it_works_below_a_path(browser):
    with LiveServer(FakeEngine(num_frames=3), root_path="/tts") as server:
        browser.open(f"http://127.0.0.1:{server.port}/tts/")
        browser.until("return document.querySelector('#voice').options.length")
        start(browser, "hello")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        assert_played(
            browser.run(STATS.replace("/page", "/tts/page")), "hello", 3, used_seed(browser)
        )


def test_settings_are_sent_only_when_touched(browser):
    engine = FakeEngine(num_frames=1)
    with LiveServer(engine, temperature=0.3) as server:
        visit(browser, server.port)
        browser.click("#settings summary")
        browser.type("#seed", "7")
        browser.type("#top_k", "\ue014", clear=False)  # Right
        start(browser, "hello")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        sampling = engine.requests[-1].sampling
        assert (sampling.seed, sampling.top_k, sampling.temperature) == (7, 51, 0.3)
        browser.click("#reset")
        start(browser, "hello")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        assert engine.requests[-1].sampling.top_k == 50


def test_the_sliders_show_the_servers_own_values(browser):
    with LiveServer(FakeEngine(), temperature=0.3, max_frames=77) as server:
        visit(browser, server.port)
        value = "return document.querySelector('#temperature').value"
        browser.until(value, holds=lambda value: value == "0.3")
        shown = "return document.querySelector('#temperature').parentElement.textContent"
        assert "0.3 (server default)" in browser.run(shown)
        assert "77" in browser.run("return document.querySelector('#max_frames').placeholder")


def test_speech_is_downloaded_in_another_format(browser):
    engine = FakeEngine(num_frames=20)
    with LiveServer(engine) as server:
        visit(browser, server.port)
        start(browser, "hello")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        assert browser.text("#used-seed") == str(engine.requests[-1].sampling.seed)
        browser.run(
            """const choice = document.querySelector("#format");
               choice.value = "mp3";
               choice.dispatchEvent(new Event("change"));"""
        )
        browser.until(NOTE, holds=lambda note: note == "The file is ready.")
        first, second = (request.sampling.seed for request in engine.requests[-2:])
        assert first == second  # so it is the same speech
        browser.click("#download")
        samples, _, metadata = with_av(browser.downloaded("speech.mp3"))
        assert len(samples) == 20 * FRAME_SAMPLES
        assert "AI-generated" in metadata["COMMENT"]


def test_a_turn_is_recorded(browser):
    engine = FakeEngine(num_frames=3)
    with LiveServer(engine) as server:
        visit(browser, server.port)
        browser.click("#tab-talk")
        browser.type("#turn", "beep beep")
        browser.click("#record-turn")
        browser.until("return /[2-9] s/.test(document.querySelector('#record-turn').textContent)")
        browser.click("#record-turn")
        browser.until(NOTE, holds=lambda note: note == "Your turn is added.")
        assert "recorded" in browser.text("#turns")
        browser.type("#turn", "what was that")
        browser.click("#talk .main")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        assert [segment.text for segment in engine.requests[-1].context] == ["beep beep"]
        assert engine.requests[-1].speaker == 1  # the other one's turn


def test_the_api_is_described_without_other_servers(browser):
    with LiveServer(FakeEngine(), root_path="/tts") as server:
        browser.open(f"http://127.0.0.1:{server.port}/tts/docs")
        browser.until("return document.querySelectorAll('#routes details').length > 10")
        for part in ("POST /generate", "repetition_penalty", "GET /v1/models"):
            assert browser.run("return document.body.textContent.includes(args[0])", part)


def test_it_fits_on_a_phone(browser):
    with LiveServer(FakeEngine()) as server:
        size = {"width": 320, "height": 640, "deviceScaleFactor": 2, "mobile": True}
        browser.devtools("Emulation.setDeviceMetricsOverride", **size)
        try:
            visit(browser, server.port)
            for tab in ("#tab-speak", "#tab-talk", "#tab-voices"):
                browser.click(tab)
                assert browser.run(TOO_WIDE) == []
        finally:
            browser.devtools("Emulation.clearDeviceMetricsOverride")


def test_it_speaks_on_a_page_without_an_audio_worklet(tmp_path):
    """Browsers have none on a page over plain HTTP whose host is not the machine itself."""
    rule = "--host-resolver-rules=MAP box 127.0.0.1"
    with (
        LiveServer(FakeEngine(num_frames=20, step_s=0.005)) as server,
        contextlib.closing(Browser(tmp_path, [rule])) as browser,
    ):
        browser.open(f"http://box:{server.port}/")
        assert not browser.run("return isSecureContext")
        browser.until(STATE, "ready")
        start(browser, "hello")
        browser.until(NOTE, holds=lambda note: note == "Done.")
        stats = browser.run(STATS)
        assert stats["underruns"] == 0
        assert_played(stats, "hello", 20, used_seed(browser))
        browser.click("#tab-voices")
        browser.click("#record")
        browser.until("return document.querySelector('#voice-note').textContent.includes('HTTPS')")
