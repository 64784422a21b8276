"""Voices, context and conversations in the Python API and in `say`."""

import json

import numpy as np
import pytest
import torch

import vox_serve
from checkpoints import TinyShape, build_tiny
from engine_testing import random_context
from fake_engine import FakeEngine
from recordings import tone
from vox_serve import say
from vox_serve.audio import pcm16
from vox_serve.config import SpeechSettings
from vox_serve.prompt import Segment
from vox_serve.speech import Voice
from vox_serve.voice_file import Sizes
from vox_serve.voice_file import Voice as VoiceFile
from vox_serve.voice_store import VoiceStore

CODES = torch.arange(8).view(2, 4)


def add_voice(folder, name="alice", speaker=1, codes=CODES, vocabulary=67) -> Segment:
    sizes = Sizes(codes.shape[1], vocabulary)
    segment = Segment(speaker, "I am Alice.", codes)
    preview = np.zeros(1920, np.int16)
    voice = VoiceFile(name, speaker, (segment,), sizes, 1, 0.08, (None,), preview, 24_000)
    VoiceStore(folder).add(voice)
    return segment


def fake(engine: FakeEngine, folder=None) -> Voice:
    return Voice(engine, SpeechSettings(), voices=folder)


def assert_same(found, expected) -> None:
    assert [(s.speaker, s.text, s.codes.tolist()) for s in found] == [
        (s.speaker, s.text, s.codes.tolist()) for s in expected
    ]


def test_a_named_voice_speaks_with_its_segments(tmp_path):
    alice = add_voice(tmp_path)
    engine = FakeEngine()
    voice = fake(engine, tmp_path)
    heard = voice.segment("Hm?", tone(), speaker=0)
    voice.say("a", voice="Alice")
    voice.say("b", voice="alice", speaker=1, context=[heard])
    list(voice.stream("c", voice="1"))
    voice.say("d", context=[heard])
    voice.say("e", context=[])
    a, b, c, d, e = engine.requests
    assert [request.speaker for request in engine.requests] == [1, 1, 1, 0, 0]
    assert_same(a.context, [alice])
    assert_same(b.context, [alice, heard])
    assert c.context is None
    assert_same(d.context, [heard])
    assert list(e.context) == []


def test_a_recording_is_a_file_its_bytes_or_samples(tmp_path):
    voice = fake(FakeEngine())
    (tmp_path / "a.wav").write_bytes(tone())
    samples = np.frombuffer(tone()[44:], "<i2").astype(np.float32) / 32768
    found = [voice.segment("Hm?", audio, 1) for audio in (tmp_path / "a.wav", tone(), samples)]
    assert len(found[0].codes) >= 10
    assert_same(found, [found[0]] * 3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"voice": "bob"}, "there is no voice 'bob'; there are 0, 1, alice, other"),
        ({"voice": "../alice"}, "there is no voice"),
        ({"voice": "other"}, "made for a model with 3 codebooks"),
        ({"voice": "alice", "speaker": 0}, "speaker is 0, but voice alice has speaker 1"),
        ({"voice": 5}, "voice must be a name"),
        ({"context": ["x"]}, "context must be segments"),
        ({"context": [Segment(0, "x")]}, "context must be segments"),
    ],
)
def test_wrong_voices_and_contexts_are_value_errors(tmp_path, wrong, said):
    add_voice(tmp_path)
    add_voice(tmp_path, "other", codes=torch.zeros(2, 3, dtype=torch.int64))
    voice = fake(FakeEngine(), tmp_path)
    for call in (voice.say, voice.stream):
        with pytest.raises(ValueError, match=said):
            call("hello", **wrong)
    with pytest.raises(ValueError, match="see --voices"):
        fake(FakeEngine()).say("hello", voice="alice")


@pytest.mark.parametrize(
    ("audio", "said"),
    [
        (b"junk", "neither WAV"),
        (np.zeros((2, 5), np.float32), "float samples"),
        (np.zeros(24_000, np.int16), "float samples"),
        (np.full(24_000, np.nan), "float samples"),
        (np.zeros(24_000), "silent|no sound"),
    ],
)
def test_wrong_recordings_are_value_errors(audio, said):
    with pytest.raises(ValueError, match=said):
        fake(FakeEngine()).segment("Hm?", audio)


# With a model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(TinyShape(), seed=31).write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def voice(folder):
    return vox_serve.load(folder, max_frames=6, seed=1, split_chars=15, max_silence_s=1000.0)


def segments(chat) -> list[Segment]:
    return [
        Segment(turn.speaker, turn.text, torch.from_numpy(turn.codes.astype(np.int64)))
        for turn in chat.turns
    ]


def test_a_turn_is_spoken_with_the_earlier_ones_as_context(voice):
    chat = voice.conversation()
    first = chat.say("Hello there.")
    np.testing.assert_array_equal(first, voice.say("Hello there."))
    chat.hear("Who is it?", tone(), speaker=1)
    before = segments(chat)
    second = chat.say("It is me.", seed=3)
    np.testing.assert_array_equal(second, voice.say("It is me.", context=before, seed=3))
    assert [(turn.text, turn.generated) for turn in chat.turns] == [
        ("Hello there.", True), ("Who is it?", False), ("It is me.", True)]  # fmt: skip
    assert len(chat.turns[0].codes) == len(first) // 1920


def test_a_stream_that_is_closed_leaves_what_was_heard(voice):
    chat = voice.conversation("1")
    text = "Some words."
    stream = chat.stream(text, max_frames=60)
    for _ in range(3):
        next(stream)
    stream.close()
    (turn,) = chat.turns
    assert (turn.speaker, turn.text, len(turn.codes), turn.generated) == (1, "Some", 3, True)
    chat.stream("Not begun.").close()
    assert len(chat.turns) == 1


def test_a_long_text_is_a_turn_for_each_part(voice):
    chat = voice.conversation()
    list(chat.stream("Ada runs far. Bob sits down.", max_frames=40))
    assert [turn.text for turn in chat.turns] == ["Ada runs far."]  # the first part never stops
    assert len(chat.turns[0].codes) == 40


def test_a_turn_that_fails_is_none(voice, monkeypatch):
    chat = voice.conversation()
    step, num_steps = voice._engine.step, 0

    def fail():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            raise RuntimeError("broke")
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(voice._engine, "step", fail)
        with pytest.raises(RuntimeError, match="broke"):
            chat.say("Hello.")
    voice._engine.reset()
    assert chat.turns == ()


def test_say_speaks_in_a_voice_with_a_context(folder, voice, tmp_path, capsys):
    shape = TinyShape()
    torch.manual_seed(5)
    codes = torch.randint(64, (5, shape.num_codebooks))
    alice = add_voice(tmp_path / "voices", codes=codes, vocabulary=shape.audio_vocab_size)
    context = random_context(shape)[:1]
    np.save(tmp_path / "codes.npy", context[0].codes.numpy())
    entries = [{"speaker": s.speaker, "text": s.text, "codes": "codes.npy"} for s in context]
    (tmp_path / "context.json").write_text(json.dumps(entries))
    flags = ["Hello there.", f"--model={folder}", "--max_frames=6", "--seed=1", "--voice=alice"]
    flags += [f"--voices={tmp_path / 'voices'}", "-o", str(tmp_path / "out.wav")]
    expected = {(): [alice], (f"--context={tmp_path / 'context.json'}",): [alice, *context]}
    for more, before in expected.items():
        assert say.main([*flags, *more]) == 0
        audio = voice.say("Hello there.", speaker=1, context=before)
        assert (tmp_path / "out.wav").read_bytes()[44:] == pcm16(audio).tobytes()
    capsys.readouterr()
    flags = ["a", "-o", str(tmp_path / "x.wav"), f"--voices={tmp_path}"]
    assert say.main([*flags, "--voice=bob"]) == 1
    assert capsys.readouterr().err == "say: error: there is no voice 'bob'; there are 0, 1\n"
    with pytest.raises(SystemExit):
        say.main([*flags, "--voice=0", "--speaker=0"])
