"""Voices made by a real engine: the codec's codes, speech in them, and live speech beside."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from fastapi.testclient import TestClient

import voxkern
from checkpoints import build_tiny
from vox_serve import voices as command
from vox_serve.api import create_app
from vox_serve.audio import pcm16, wav_file
from vox_serve.config import Config
from vox_serve.engine import Request
from vox_serve.kv_cache import PAGE_SIZE
from vox_serve.loading import load_engine
from vox_serve.prompt import Segment
from vox_serve.runner import Runner
from vox_serve.sampling import SamplingParams
from vox_serve.say import speak
from vox_serve.voice_file import VoiceError
from vox_serve.voice_maker import Excerpt, VoiceMaker
from vox_serve.voice_store import VoiceStore

VOICES = "/v1/audio/voices"
SEED = SamplingParams(seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(seed=5).write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def engine(folder):
    return load_engine(str(folder))


@pytest.fixture(scope="module")
def maker(engine):
    return VoiceMaker(engine.mimi, engine.prompts)


@pytest.fixture
def client(folder):
    config = Config(model=str(folder), max_frames=30)
    runner = Runner.for_config(load_engine(config.model), config)
    with TestClient(create_app(runner, config, {})) as client:
        yield client


def tone(seconds: float, hz: float = 300) -> np.ndarray:
    t = np.arange(int(seconds * 24_000)) / 24_000
    return (0.3 * np.sin(2 * np.pi * hz * t) * np.sin(2 * np.pi * t) ** 2).astype(np.float32)


def wav(audio: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, 24_000, "FLOAT", format="WAV")
    return file.getvalue()


def form(name: str, *recordings: tuple[bytes, str]) -> list[tuple]:
    parts: list[tuple] = [("name", (None, name))]
    for audio, transcript in recordings:
        parts += [("audio", ("a.wav", audio)), ("transcript", (None, transcript))]
    return parts


@pytest.mark.parametrize("seconds", [0.4, 0.64, 1.0, 1.93])
def test_codes_are_those_of_the_whole_recording(seconds, maker, engine):
    audio = tone(seconds)
    voice = maker.make("a", 1, [Excerpt(audio, "Hello."), Excerpt(tone(0.5), "Bye.", -20.0)])
    expected = engine.mimi.encode(torch.from_numpy(audio)[None], engine.num_codebooks)[0]
    assert torch.equal(voice.segments[0].codes, expected)
    decoded = [engine.mimi.decode(s.codes[None])[0].numpy() for s in voice.segments]
    np.testing.assert_array_equal(voice.preview, pcm16(np.concatenate(decoded)))
    assert [s.text for s in voice.segments] == ["Hello.", "Bye."]
    assert voice.levels_dbfs == (None, -20.0)


def test_bounds_are_those_of_the_models_context(maker):
    assert maker.max_positions == 128
    longest = 128 - 1 - len(maker.prompts.tokens(Segment(0, "x")))
    maker.make("a", 0, [Excerpt(tone(longest * 0.08), "x")])
    with pytest.raises(VoiceError, match=r"take 129 positions .* may have 128"):
        maker.make("a", 0, [Excerpt(tone(longest * 0.08 + 0.01), "x")])
    with pytest.raises(VoiceError, match=r"recording 2 lasts 0.24 s, at least 0.32 s"):
        maker.make("a", 0, [Excerpt(tone(1), "x"), Excerpt(tone(0.2), "y")])
    with pytest.raises(VoiceError, match="1 to 16 recordings, got 0"):
        maker.make("a", 0, [])


def test_a_request_in_a_voice_speaks_with_its_codes_before_the_text(client, engine, maker):
    answer = client.post(VOICES, files=form("alice", (wav(tone(1.2)), "Hello there.")))
    assert answer.status_code == 201, answer.text
    spoken = client.post("/generate", json={"text": "Who is it?", "voice": "alice", "seed": 3})
    excerpt = maker.excerpt(wav(tone(1.2)), "Hello there.")
    segments = maker.make("alice", 0, [excerpt]).segments
    request = Request("Who is it?", context=segments, sampling=SEED, max_frames=30)
    audio, *_ = speak(engine, request)
    assert spoken.content == wav_file(pcm16(audio).tobytes())
    plain = client.post("/generate", json={"text": "Who is it?", "seed": 3})
    assert plain.content != spoken.content


def test_the_second_use_of_a_voice_prefills_only_the_text(engine, maker):
    segments = maker.make("a", 0, [Excerpt(tone(4, hz=250), "A voice of its own.")]).segments
    num_positions = len(engine.prompts.build(segments)[0])
    found = []
    for text in ("Who is it?", "Me."):
        before = engine.num_found_positions
        speak(engine, Request(text, context=segments, sampling=SEED, max_frames=2))
        found.append(engine.num_found_positions - before)
    assert found[0] < PAGE_SIZE
    assert num_positions - PAGE_SIZE < found[1]


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 3])
def test_live_speech_keeps_its_samples_while_voices_are_made(num_threads, client, engine):
    body = {"text": "Hello there.", "seed": 3, "streaming": True}
    audio, *_ = speak(engine, Request("Hello there.", sampling=SEED, max_frames=30))
    expected = pcm16(audio).tobytes()
    upload = form("alice", (wav(tone(6)), "Hello there."))
    codes = []
    before = voxkern.num_threads()
    voxkern.set_num_threads(num_threads)
    try:
        with ThreadPoolExecutor(4) as pool:
            adding = pool.submit(
                lambda: [
                    client.post(VOICES, files=upload, data={"replace": "true"}).status_code
                    for _ in range(4)
                ]
            )
            while not adding.done():
                streams = [pool.submit(client.post, "/generate", json=body) for _ in range(3)]
                assert [s.result().content[44:] for s in streams] == [expected] * 3
                codes.append(client.get(f"{VOICES}/alice/sample").content)
            assert adding.result() == [201] * 4
    finally:
        voxkern.set_num_threads(before)
    alone = client.get(f"{VOICES}/alice/sample").content
    assert {c for c in codes if c.startswith(b"RIFF")} == {alone}


def test_the_command_adds_lists_plays_and_removes(folder, tmp_path, capsys, maker):
    (tmp_path / "a.wav").write_bytes(wav(tone(1.2)))
    kept = ["--voices", str(tmp_path / "kept")]
    add = ["add", "Alice", "--audio", str(tmp_path / "a.wav"), "--transcript", "Hello there."]
    add += ["--speaker", "1", "--model", str(folder), *kept]
    assert command.main(add) == 0
    assert capsys.readouterr().out.startswith("Alice: 1.")
    assert command.main(add) == 1
    assert "there is a voice 'Alice'" in capsys.readouterr().err
    assert command.main([*add, "--replace"]) == 0
    capsys.readouterr()
    (tmp_path / "kept" / "bad.safetensors").write_bytes(b"x")
    assert command.main(["list", *kept]) == 0
    alice, bad = capsys.readouterr().out.splitlines()
    assert alice.startswith("Alice: 1.")
    assert ", speaker 1, 20" in alice
    assert alice.endswith(": Hello there.")
    assert bad.startswith("bad: voice 'bad' cannot be used: it is no safetensors file")
    assert command.main(["preview", "alice", "-o", str(tmp_path / "out.wav"), *kept]) == 0
    voice = VoiceStore(tmp_path / "kept").get("alice")
    samples, rate_hz = soundfile.read(tmp_path / "out.wav", dtype="int16")
    np.testing.assert_array_equal(samples, voice.preview)
    assert (rate_hz, voice.speaker) == (24_000, 1)
    excerpt = maker.excerpt(tmp_path / "a.wav", "Hello there.")
    (expected,) = maker.make("alice", 1, [excerpt]).segments
    assert torch.equal(voice.segments[0].codes, expected.codes)
    assert command.main(["remove", "alice", *kept]) == 0
    assert command.main(["remove", "alice", *kept]) == 1
    assert capsys.readouterr().err == "voices: error: there is no voice 'alice'\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["list"], "give --voices DIR"),
        (["list", "alice", "--voices", "x"], "list takes no name"),
        (["remove", "--voices", "x"], "remove needs a name"),
        (["add", "alice", "--voices", "x"], "--audio FILE and --transcript TEXT"),
        (["add", "alice", "--voices", "x", "--audio", "a"], "equally often"),
        (["preview", "alice", "--voices", "x"], "needs -o"),
        (["play", "alice", "--voices", "x"], "invalid choice"),
    ],
)
def test_a_wrong_command_is_one_line(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("voices: error: ")
    assert says in line


@pytest.mark.parametrize("action", ["list", "remove", "preview"])
def test_a_missing_folder_is_named_and_not_made(action, tmp_path, capsys):
    argv = [action, *([] if action == "list" else ["alice"]), "--voices", str(tmp_path / "none")]
    argv += ["-o", str(tmp_path / "out.wav")] if action == "preview" else []
    assert command.main(argv) == 1
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
