"""`say` for people: text from a file, conversations, sound, progress."""

import io
import json
import sys

import numpy as np
import pytest

from fake_device import FakeDevice
from fake_engine import FakeEngine, expected_pcm, fake_codes
from vox_serve import say
from vox_serve.audio import wav_file
from vox_serve.progress import Progress
from vox_serve.prompt import PromptTooLongError


@pytest.fixture
def engine(monkeypatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(say, "make_engine", lambda *_, **__: engine)
    return engine


@pytest.fixture
def wav(tmp_path):
    return tmp_path / "out.wav"


@pytest.mark.parametrize("content", [b"hello", b"hello\n", b"\xef\xbb\xbfhello\r\n"])
def test_the_text_of_a_file(content, engine, wav, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    assert say.main(["-f", str(file), "-o", str(wav)]) == 0
    assert wav.read_bytes() == wav_file(expected_pcm("hello", 3))


def test_a_dash_is_stdin(engine, wav, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    assert say.main(["--file", "-", "-o", str(wav)]) == 0
    assert wav.read_bytes() == wav_file(expected_pcm("hello", 3))


def test_a_file_that_is_missing_is_one_line(engine, wav, capsys):
    assert say.main(["-f", "nowhere.txt", "-o", str(wav)]) == 1
    assert capsys.readouterr().err == (
        "say: error: cannot read nowhere.txt: No such file or directory\n"
    )


@pytest.mark.parametrize("flags", [["hello", "-f", "x", "-o", "y.wav"], ["hello"]])
def test_a_text_comes_from_one_place_and_goes_somewhere(flags, engine):
    with pytest.raises(SystemExit) as ended:
        say.main(flags)
    assert ended.value.code == 2


def test_a_conversation_is_continued(engine, wav, tmp_path):
    chat = tmp_path / "chat.json"
    line = ["-o", str(wav), "--conversation", str(chat)]
    assert say.main(["hello", *line]) == 0
    assert say.main(["hello too", "--speaker", "1", *line]) == 0
    assert say.main(["bye", *line]) == 0
    entries = json.loads(chat.read_text())
    assert [(e["speaker"], e["text"]) for e in entries] == [
        (0, "hello"), (1, "hello too"), (0, "bye")
    ]  # fmt: skip
    first, second, third = engine.requests
    assert first.context is None
    assert [segment.text for segment in second.context] == ["hello"]
    heard = [(segment.speaker, segment.text) for segment in third.context]
    assert heard == [(0, "hello"), (1, "hello too")]
    expected = [fake_codes("hello too", n).tolist() for n in range(3)]
    assert third.context[1].codes.tolist() == expected
    assert np.load(tmp_path / entries[1]["codes"]).tolist() == expected


def test_the_oldest_turns_give_way(engine, wav, tmp_path, capsys):
    chat = tmp_path / "chat.json"
    line = ["-o", str(wav), "--conversation", str(chat)]
    for text in ("one", "two", "three"):
        assert say.main([text, *line]) == 0
    prepare = engine.prepare

    def prepare_short(request):
        if len(request.context or ()) > 1:
            raise PromptTooLongError("too long")
        return prepare(request)

    engine.prepare = prepare_short
    capsys.readouterr()
    assert say.main(["four", *line]) == 0
    assert [segment.text for segment in engine.requests[-1].context] == ["three"]
    assert capsys.readouterr().err == "say: warning: the first 2 turns do not fit\n"
    assert len(json.loads(chat.read_text())) == 4


def test_speech_is_played(engine, wav, monkeypatch):
    device = FakeDevice()
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    assert say.main(["hello", "--play", "-o", str(wav)]) == 0
    assert device.played == expected_pcm("hello", 3)
    assert wav.read_bytes() == wav_file(device.played)
    assert say.main(["hello", "--play"]) == 0
    assert device.played == 2 * expected_pcm("hello", 3)


def test_no_sound_device_is_one_line_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(say, "make_engine", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.setitem(sys.modules, "sounddevice", FakeDevice(has_device=False))
    assert say.main(["hello", "--play"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("say: error: --play found no sound device")


def test_a_terminal_sees_the_real_time_factor(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(1, 100) as progress:
        for _ in range(50):
            progress.frame(0)
        progress.end()
    assert capsys.readouterr().err.splitlines()[-1].startswith("4.0 s of speech, real-time factor ")


def test_nothing_is_shown_elsewhere(capsys):
    with Progress(3, None) as progress:
        progress.frame(2)
        progress.end()
    assert capsys.readouterr().err == ""
