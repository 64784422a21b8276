"""Speech that its model does not end is cut, faded and reported; other speech is left alone."""

import re
import wave

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import vox_serve
from checkpoints import build_tiny
from csm_reference import reference_generate
from engine_testing import GREEDY, run
from fake_engine import ENDLESS, FakeEngine, expected_audio, expected_pcm, fake_audio
from vox_serve import say
from vox_serve.api import create_app
from vox_serve.audio import pcm16, wav_file
from vox_serve.config import Config
from vox_serve.ending import FADE_SAMPLES, SilenceGuard, fade_out, fade_tail
from vox_serve.engine import Engine, Request
from vox_serve.loading import load_engine
from vox_serve.prompt import Segment
from vox_serve.runner import Runner
from vox_serve.speech import SpeechCutWarning, Voice
from vox_serve.text_bound import frames_bound

SILENT_FRAMES = 38  # 3 s
SPEECH, PAUSE, HISS, ZERO = 0.1, 5e-4, 2e-3, 0.0  # levels: -20, -66, -54 dBFS and nothing


def frames_until_cut(levels: list[float], max_silence_s: float = 3.0) -> int | None:
    guard = SilenceGuard(max_silence_s)
    return next((i + 1 for i, level in enumerate(levels) if guard.is_over(level)), None)


@pytest.mark.parametrize("quiet", [ZERO, PAUSE])
def test_silence_after_speech_is_cut_after_its_time(quiet):
    assert frames_until_cut([SPEECH] * 20 + [quiet] * 50) == 20 + SILENT_FRAMES
    assert frames_until_cut([SPEECH] * 20 + [quiet] * 50, max_silence_s=0.16) == 22
    assert frames_until_cut([SPEECH] * 20 + [quiet] * 50, max_silence_s=0.01) == 21


def test_speech_that_never_begins_is_cut():
    assert frames_until_cut([ZERO] * 50) == SILENT_FRAMES
    assert frames_until_cut([5e-5] * 50) == SILENT_FRAMES


@pytest.mark.parametrize(
    "levels",
    [
        ([SPEECH] * 5 + [ZERO] * (SILENT_FRAMES - 1)) * 9,  # pauses shorter than the limit
        [SPEECH] * 5 + [HISS] * 99,  # a noise floor that can be heard
        [1.0] * 5 + [HISS] * 99,  # 54 dB below the speech, but above -60 dBFS
        [0.02] * 5 + [PAUSE] * 99,  # below -60 dBFS, but only 32 dB below the speech
        [PAUSE] * 99,  # very quiet speech from the start
    ],
)
def test_pauses_and_quiet_speech_are_not_cut(levels):
    assert frames_until_cut(levels) is None


def test_a_limit_of_zero_cuts_nothing():
    assert frames_until_cut([SPEECH] + [ZERO] * 9999, max_silence_s=0) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("No.", 3),
        ("Hmm... well... I don't know.", 10),
        ("It was a bright cold day in April, and the clocks were striking thirteen.", 12),
        ("555 0123 4567", 10),  # digit by digit
        ("WWW, BBC, HTTP.", 9),  # letter by letter
        ("$1,250,000.75", 9),
        ("我不知道他什么时候来。", 9),
        ("Ты меня слышишь?", 6),
        ("🎉🎉🎉", 5),
    ],
)
def test_slow_readings_are_within_the_bound(text, seconds):
    """Durations of slow readings; 1.5 times as long is fine too, 90 s of it is not."""
    assert 1.5 * seconds / 0.08 < frames_bound(text) < 1125


def test_the_fade_leads_to_zero_without_a_step():
    audio = np.ones(1920, np.float32)
    faded = fade_out(audio)
    np.testing.assert_array_equal(faded[:-FADE_SAMPLES], audio[:-FADE_SAMPLES])
    np.testing.assert_array_equal(audio, 1)
    assert FADE_SAMPLES == 240
    assert faded[-1] == 0
    steps = np.diff(faded)
    assert steps.max() <= 0
    assert steps.min() > -0.01
    np.testing.assert_array_equal(fade_tail(-0.5), -0.5 * faded[-FADE_SAMPLES:])
    assert fade_out(audio[:5])[-1] == 0
    assert fade_out(audio[:0]).size == 0


# Tiny models that never draw the stop frame. A random codec makes noise.


@pytest.fixture(scope="module")
def tiny():
    return build_tiny(seed=4)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def mute_folder(tmp_path_factory):
    """A checkpoint whose codec's last layer gives zeros."""
    tiny = build_tiny(seed=77)
    layers = {n: t for n, t in tiny.tensors.items() if n.startswith("codec_model.decoder.layers.")}
    last = max(int(re.search(r"layers\.(\d+)\.", name)[1]) for name in layers)
    for name, tensor in layers.items():
        if f"layers.{last}." in name:
            tensor.zero_()
    return tiny.write(tmp_path_factory.mktemp("mute"))


@pytest.mark.slow
def test_the_engine_cuts_silence(mute_folder, folder):
    """In a batch too; a request beside it and the codes before the cut are the same."""
    plain = load_engine(str(mute_folder), max_silence_s=0.0)
    request = Request("Hello.", sampling=GREEDY, max_frames=60)
    codes, audio, reason = run(plain, request)[request.id]
    assert (len(codes), reason) == (60, "length")
    assert not audio.any()
    guarded = Engine(plain.model, plain.mimi, plain.prompts, max_silence_s=3.0)
    short = Request("Hello.", sampling=GREEDY, max_frames=9)
    spoken = run(guarded, request, short)
    assert torch.equal(spoken[request.id][0], codes[:SILENT_FRAMES])
    assert spoken[request.id][2] == "silence"
    assert torch.equal(spoken[short.id][0], codes[:9])
    assert spoken[short.id][2] == "length"
    assert not guarded.has_work
    noisy = load_engine(str(folder))
    assert noisy.max_silence_s == 3.0
    assert run(noisy, request)[request.id][2] == "length"


def test_an_engine_without_a_guard_cuts_nothing(tiny, mute_folder):
    loaded = load_engine(str(mute_folder))
    engine = Engine(loaded.model, loaded.mimi, loaded.prompts)
    request = Request("Hello.", sampling=GREEDY, max_frames=50)
    codes, _, reason = run(engine, request)[request.id]
    assert (len(codes), reason) == (50, "length")


def say_codes(folder, tmp_path, capsys, *flags: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Codes, samples and the messages of `say "I." --greedy`."""
    wav, npy = tmp_path / "out.wav", tmp_path / "out.npy"
    argv = ["I.", "--model", str(folder), "--greedy", "--dtype=float32", *flags]
    assert say.main([*argv, "-o", str(wav), "--codes", str(npy)]) == 0
    with wave.open(str(wav)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return np.load(npy), samples, capsys.readouterr().err


@pytest.mark.slow
def test_say_cuts_noise_at_the_texts_bound(tiny, folder, tmp_path, capsys):
    bound = frames_bound("I.")
    codes, samples, messages = say_codes(folder, tmp_path, capsys)
    assert torch.equal(torch.from_numpy(codes), reference_generate(tiny, [Segment(0, "I.")], bound))
    (line,) = messages.splitlines()
    assert line.startswith(f"say: warning: cut at max_frames {bound} (")
    # The fade changes the last 10 ms only.
    engine = load_engine(str(folder), dtype="float32")
    request = Request("I.", sampling=GREEDY, max_frames=bound)
    whole = pcm16(run(engine, request)[request.id][1].numpy())
    np.testing.assert_array_equal(samples[:-FADE_SAMPLES], whole[:-FADE_SAMPLES])
    assert samples[-1] == 0
    assert (samples[-FADE_SAMPLES:] != whole[-FADE_SAMPLES:]).any()


def test_a_default_limit_is_the_texts_bound():
    assert Config().frames_for("I.") == frames_bound("I.")
    assert Config().frames_for("a" * 400) == 1125
    assert Config().frames_for("a" * 500) == frames_bound("a" * 500)  # spoken in parts
    assert Config(split_chars=0).frames_for("a" * 500) == 1125
    assert Config(max_silence_s=0.0).frames_for("I.") == 1125
    assert Config(max_frames=1125).frames_for("I.") == 1125


@pytest.mark.parametrize("source", ["flag", "variable"])
def test_a_given_limit_replaces_the_texts_bound(folder, tmp_path, capsys, monkeypatch, source):
    limit = frames_bound("I.") + 9
    flags = [f"--max_frames={limit}"] if source == "flag" else []
    if source == "variable":
        monkeypatch.setenv("VOX_SERVE_MAX_FRAMES", str(limit))
    codes, _, messages = say_codes(folder, tmp_path, capsys, *flags)
    assert len(codes) == limit
    assert f"cut at max_frames {limit} (" in messages


def test_say_cuts_silence(mute_folder, tmp_path, capsys):
    codes, samples, messages = say_codes(mute_folder, tmp_path, capsys, "--max_frames=70")
    assert len(codes) == SILENT_FRAMES
    assert len(samples) == SILENT_FRAMES * 1920
    assert messages == "say: warning: cut after a long silence at its end (38 frames, 3.0 s)\n"
    flags = "--max_frames=41", "--max_silence_s=0"
    codes, _, messages = say_codes(mute_folder, tmp_path, capsys, *flags)
    assert len(codes) == 41
    assert "cut at max_frames 41" in messages


def test_speech_that_ends_by_itself_gets_no_warning_and_no_fade(tmp_path, capsys):
    stopping = build_tiny(stop_frame=3).write(tmp_path / "stops")
    capsys.readouterr()
    codes, samples, messages = say_codes(stopping, tmp_path, capsys)
    assert (len(codes), messages) == (3, "")
    engine = load_engine(str(stopping), dtype="float32")
    request = Request("I.", sampling=GREEDY)
    np.testing.assert_array_equal(samples, pcm16(run(engine, request)[request.id][1].numpy()))


def test_the_python_api_warns_and_returns_the_reason(mute_folder):
    voice = vox_serve.load(mute_folder, max_frames=50, temperature=0.0)
    with pytest.warns(SpeechCutWarning, match="cut after a long silence") as caught:
        assert len(voice.say("Hello.")) == SILENT_FRAMES * 1920
    assert caught[0].filename == __file__

    def read(stream):
        reasons.append((yield from stream))

    reasons = []
    with pytest.warns(SpeechCutWarning, match="cut at max_frames 5"):
        assert len(list(read(voice.stream("Hello.", max_frames=5)))) == 5
    assert reasons == ["length"]


def test_streamed_and_whole_speech_fade_alike():
    voice = Voice(FakeEngine(), Config(max_frames=2, seed=3))
    with pytest.warns(SpeechCutWarning):
        whole = voice.say("a")
    with pytest.warns(SpeechCutWarning):
        chunks = list(voice.stream("a"))
    np.testing.assert_array_equal(whole, expected_audio("a", 2, seed=3, cut=True))
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    voice = Voice(FakeEngine(2), Config(seed=3))
    np.testing.assert_array_equal(
        voice.say("a"), np.concatenate([fake_audio("a", 3, i) for i in range(2)])
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_the_server_bounds_what_no_request_limits(streaming):
    engine = FakeEngine(num_frames=ENDLESS)
    config = Config(seed=1)
    with TestClient(create_app(Runner(engine, 8), config, {})) as client:
        body = {"text": "Hi.", "streaming": streaming}
        answer = client.post("/generate", json=body)
        bound = frames_bound("Hi.")
        assert answer.content[44:] == expected_pcm("Hi.", bound, seed=1, cut=True)
        longer = client.post("/generate", json={**body, "max_frames": bound + 5})
        assert longer.content[44:] == expected_pcm("Hi.", bound + 5, seed=1, cut=True)
        assert len(wav_file(longer.content[44:])) == len(longer.content)


@pytest.mark.parametrize(
    ("fields", "reason", "num_frames"),
    [
        ({}, "silence", SILENT_FRAMES),
        ({"max_frames": 60}, "silence", SILENT_FRAMES),
        ({"max_frames": 4}, "length", 4),
    ],
)
def test_a_whole_answer_names_the_reason(mute_folder, fields, reason, num_frames):
    engine = load_engine(str(mute_folder))
    with TestClient(create_app(Runner(engine, 8), Config(), {})) as client:
        answer = client.post("/generate", json={"text": "Hello there.", **fields})
        assert answer.status_code == 200
        assert answer.headers["X-Finish-Reason"] == reason
        assert len(answer.content) == 44 + num_frames * 3840


def test_a_stopped_answer_names_its_reason(tmp_path):
    engine = load_engine(str(build_tiny(stop_frame=3).write(tmp_path)))
    with TestClient(create_app(Runner(engine, 8), Config(), {})) as client:
        answer = client.post("/generate", json={"text": "Hello there."})
        assert answer.headers["X-Finish-Reason"] == "stop"
