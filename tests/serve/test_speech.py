"""The Python API: the same samples as the commands, interleaved streams, invalid arguments."""

import threading
import wave

import numpy as np
import pytest

import vox_serve
from checkpoints import build_tiny
from fake_engine import ENDLESS, FakeEngine, expected_audio
from vox_serve import say
from vox_serve.audio import pcm16
from vox_serve.config import ConfigError, SpeechSettings
from vox_serve.speech import Voice

TEXTS = ["Hello there.", "How are you?", "Number three."]
MAX_FRAMES = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(seed=4).write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def voice(folder):
    return vox_serve.load(folder, max_frames=MAX_FRAMES, seed=1, max_batch_size=2)


def fake_voice(engine: FakeEngine | None = None, **settings) -> Voice:
    return Voice(engine or FakeEngine(), SpeechSettings(**settings))


@pytest.mark.parametrize("overrides", [{}, {"temperature": 0.5, "top_k": 3, "seed": 9}])
def test_the_samples_are_the_commands(overrides, voice, folder, tmp_path):
    audio = voice.say("Hello there.", speaker=1, **overrides)
    flags = [f"--{name}={value}" for name, value in ({"seed": 1} | overrides).items()]
    flags += [f"--model={folder}", f"--max_frames={MAX_FRAMES}", "--speaker=1"]
    assert say.main(["Hello there.", "-o", str(tmp_path / "out.wav"), *flags]) == 0
    with wave.open(str(tmp_path / "out.wav")) as reader:
        assert reader.getframerate() == voice.sample_rate_hz == 24_000
        assert reader.readframes(reader.getnframes()) == pcm16(audio).tobytes()
    assert (audio.dtype, audio.shape) == (np.float32, (MAX_FRAMES * 1920,))
    chunks = list(voice.stream("Hello there.", 1, **overrides))
    assert [chunk.shape for chunk in chunks] == [(1920,)] * MAX_FRAMES
    np.testing.assert_array_equal(np.concatenate(chunks), audio)


def test_interleaved_streams_get_what_they_get_alone(voice):
    """Three streams with room for two: the third waits for one of the others."""
    alone = [voice.say(text, seed=i) for i, text in enumerate(TEXTS)]
    streams = [voice.stream(text, seed=i) for i, text in enumerate(TEXTS)]
    found = list(zip(*streams, strict=True))
    for audio, chunks in zip(alone, zip(*found, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(chunks), audio)


def test_streams_in_threads_get_what_they_get_alone(voice):
    alone = [voice.say(text, seed=i) for i, text in enumerate(TEXTS)]
    found: dict[int, np.ndarray] = {}

    def speak(i: int) -> None:
        found[i] = voice.say(TEXTS[i], seed=i)

    threads = [threading.Thread(target=speak, args=(i,)) for i in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, audio in enumerate(alone):
        np.testing.assert_array_equal(found[i], audio)


def test_an_abandoned_stream_aborts_its_request(voice):
    engine = voice._engine.engine
    free = engine._cache.num_free_pages
    other = voice.stream("Another.")
    next(other)
    for abandon in ("close", "drop"):
        stream = voice.stream("Hello there.")
        next(stream)
        assert engine.num_live == 2
        if abandon == "close":
            stream.close()
        del stream
        assert engine.num_live == 1
    assert len(list(other)) == MAX_FRAMES - 1
    assert engine._cache.num_free_pages == free


def test_a_stream_that_never_starts_costs_nothing():
    engine = FakeEngine()
    fake_voice(engine).stream("hello")
    assert (engine.requests, engine.aborted) == ([], [])


def test_a_stream_that_is_collected_within_a_step_is_aborted_by_the_next():
    engine = FakeEngine(num_frames=ENDLESS)
    voice = fake_voice(engine)
    streams = [voice.stream("left"), voice.stream("kept")]
    for stream in streams:
        next(stream)
    step = engine.step

    def collecting_step():
        if len(streams) == 2:
            del streams[0]
        return step()

    engine.step = collecting_step
    kept = streams[1]
    del stream
    next(kept)
    assert engine.aborted == []
    next(kept)
    assert [r.text for r in engine.requests if r.id in engine.aborted] == ["left"]


def test_settings_are_the_defaults_and_keywords_override_them():
    engine = FakeEngine()
    voice = fake_voice(engine, temperature=0.5, seed=3, max_frames=2)
    np.testing.assert_array_equal(voice.say("a"), expected_audio("a", 2, seed=3, cut=True))
    voice.say("b", speaker=1, seed=4, max_frames=1, top_p=None, normalise="on")
    first, second = engine.requests
    assert (first.speaker, first.max_frames, first.sampling.temperature) == (0, 2, 0.5)
    assert (second.speaker, second.max_frames, second.sampling.seed) == (1, 1, 4)
    assert second.sampling.temperature == 0.5
    assert (first.normalise, second.normalise) == ("auto", "on")


def test_an_empty_utterance():
    audio = fake_voice(FakeEngine(num_frames=0)).say("hello")
    assert (audio.dtype, audio.shape) == (np.float32, (0,))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"text": ""}, "text must be a string that is not blank"),
        ({"text": " \n"}, "text must be"),
        ({"text": None}, "text must be"),
        ({"text": "a\udc80"}, "text must be valid Unicode"),
        ({"text": "x" * 5000}, "takes 5000 of 2000"),
        ({"text": "x" * 100_001}, "at most 100000 characters, got 100001"),
        ({"speaker": -1}, "speaker must be a whole number from 0, got -1"),
        ({"speaker": "0"}, "speaker must be"),
        ({"speaker": True}, "speaker must be"),
        ({"temperature": -1}, "temperature must be from 0 to 100, got -1"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"max_frames": 0}, "max_frames must be"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"temprature": 1}, "temprature is not a setting"),
        ({"port": 80}, "port is not a setting"),
    ],
)
def test_a_wrong_argument_is_a_value_error_that_names_it(wrong, said):
    voice = fake_voice()
    for call in (voice.say, voice.stream):
        with pytest.raises(ValueError, match=said):
            call(**{"text": "hello", **wrong})
    assert voice._streams._outputs == {}


def test_wrong_settings_are_a_value_error_before_any_loading(monkeypatch):
    for wrong in ({"dtype": "float16"}, {"quantize": 4}, {"temprature": 1.0}, {"seed": "x"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            vox_serve.load("./nowhere", **wrong)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        vox_serve.load("./nowhere")
    monkeypatch.setenv("VOX_SERVE_QUANTIZE", "int5")
    with pytest.raises(ValueError, match="VOX_SERVE_QUANTIZE"):
        vox_serve.load("demo")


def test_the_package_exports_its_names_lazily():
    assert vox_serve.Voice is Voice
    with pytest.raises(AttributeError, match="no attribute 'speak'"):
        vox_serve.speak  # noqa: B018
