"""The page in a real Firefox: the samples that its audio graph plays."""

import contextlib
import shutil
import subprocess

import numpy as np
import pytest

import firefox
from fake_engine import FakeEngine, expected_audio
from live_server import LiveServer
from vox_serve.audio import pcm16

HAS_SOUND = (
    shutil.which("pactl") and not subprocess.run(["pactl", "info"], capture_output=True).returncode
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not firefox.FIREFOX, reason="needs firefox (Debian: firefox-esr)"),
    pytest.mark.skipif(not HAS_SOUND, reason="needs a sound device: PulseAudio's null sink is one"),
]


def test_a_text_is_spoken_to_its_end(tmp_path):
    with (
        LiveServer(FakeEngine(num_frames=10, step_s=0.005)) as server,
        contextlib.closing(firefox.Firefox(tmp_path)) as browser,
    ):
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.until("return document.querySelector('#voice').options.length")
        browser.run(
            """document.querySelector("#text").value = "hello";
               document.querySelector("#speak .main").click();"""
        )
        browser.until(
            "return document.querySelector('#note').textContent",
            holds=lambda note: note == "Done.",
        )
        stats = browser.run("return (await import('/page/app.js')).player.stats;")
        seed = int(browser.run("return document.querySelector('#used-seed').textContent;"))
    wanted = pcm16(expected_audio("hello", 10, seed)).astype(np.float64) / 32768
    assert stats["played"] == len(wanted)
    assert stats["squares"] == pytest.approx((wanted**2).sum(), rel=1e-6)
