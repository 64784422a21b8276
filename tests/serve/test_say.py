import io
import os
import sys
import wave

import numpy as np
import pytest
import torch

from checkpoints import TinyShape, build_tiny
from csm_reference import reference_generate
from encoded import NOTE, frames_of, pieces_of
from fake_engine import FakeEngine, expected_pcm, fake_audio, fake_codes
from vox_serve import loading, say
from vox_serve.audio import wav_file
from vox_serve.config import Config
from vox_serve.encoders import open_encoder, open_shaper
from vox_serve.ending import FADE_SAMPLES
from vox_serve.formats import FORMATS, Output
from vox_serve.prompt import Segment
from vox_serve.sampling import SamplingParams
from voxkern import backend


class Loads:
    """Fake `make_engine`: records the config and returns a fake engine."""

    def __init__(self):
        self.engine = FakeEngine()
        self.config: Config | None = None

    def __call__(self, config: Config, keeps_one: bool = False) -> FakeEngine:
        assert keeps_one
        self.config = config
        return self.engine


@pytest.fixture
def loads(monkeypatch) -> Loads:
    loads = Loads()
    monkeypatch.setattr(say, "make_engine", loads)
    return loads


@pytest.fixture
def no_loading(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("loaded a model for a command that cannot succeed")

    monkeypatch.setattr(say, "make_engine", fail)


@pytest.fixture
def stdin(monkeypatch):
    def set_stdin(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return set_stdin


def test_writes_the_audio_and_the_frames(loads, tmp_path, capsys):
    wav, codes = tmp_path / "out.wav", tmp_path / "codes.npy"
    assert say.main(["hello", "-o", str(wav), "--codes", str(codes)]) == 0
    assert wav.read_bytes() == wav_file(expected_pcm("hello", 3))
    frames = np.load(codes)
    assert frames.dtype == np.int64
    assert frames.tolist() == [fake_codes("hello", i).tolist() for i in range(3)]
    assert capsys.readouterr() == ("", "")  # a progress bar only on a terminal


@pytest.mark.parametrize("name", FORMATS)
def test_the_ending_chooses_the_format(name, loads, tmp_path):
    path, other = tmp_path / f"out.{name}", tmp_path / "out"
    assert say.main(["hello", "-o", str(path)]) == 0
    assert say.main(["hello", "-o", str(other), "--format", name]) == 0
    samples = b"".join(frames_of("hello", 3))
    if (shaper := open_shaper(Output.of(name))) is not None:
        samples = b"".join(pieces_of(shaper, [samples]))
    encoder = open_encoder(Output.of(name), NOTE, len(samples) // 2)
    expected = b"".join(pieces_of(encoder, [samples]))
    assert other.read_bytes() == expected
    if name != "wav":  # whose default has its header and samples only
        assert path.read_bytes() == expected


def test_speed_and_sample_rate(loads, tmp_path):
    path = tmp_path / "out.wav"
    flags = ["--speed", "0.5", "--sample-rate", "48000"]
    assert say.main(["hello", "-o", str(path), *flags]) == 0
    with wave.open(str(path)) as reader:
        assert reader.getframerate() == 48_000
        assert reader.getnframes() == pytest.approx(4 * 3 * 1920, abs=4096)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-o a.mp3 --sample_rate 8000", "use 24000"),
        ("-o a.wav --speed 5", "0.25 to 4"),
        ("-o a.wav --speed nan", "0.25 to 4"),
        ("-o a.wav --format m4a", "invalid choice"),
    ],
)
def test_a_wrong_format_is_code_2(flags, said, no_loading, capsys):
    with pytest.raises(SystemExit) as exit_info:
        say.main(["hello", *flags.split()])
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err


def test_an_empty_utterance(loads, tmp_path):
    loads.engine = FakeEngine(num_frames=0)
    wav, codes = tmp_path / "out.wav", tmp_path / "codes.npy"
    assert say.main(["hello", "-o", str(wav), "--codes", str(codes)]) == 0
    assert wav.read_bytes() == wav_file(b"")
    assert (np.load(codes).shape, np.load(codes).dtype) == ((0, 4), np.int64)


def test_flags_reach_the_engine(loads, tmp_path):
    line = "--model M --speaker 1 --seed 7 --max_frames 2 --context c.json --dtype float32 "
    line += "--temperature 0.5 --top-k 3 --top_p 0.5 --min-p 0.25 --repetition_penalty 2 "
    line += "--repetition-window 4"
    assert say.main(["hello", "-o", str(tmp_path / "out.wav"), *line.split()]) == 0
    sampling = SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=2.0,
        repetition_window=4,
        seed=7,
    )
    assert loads.config == Config(
        model="M",
        context="c.json",
        dtype="float32",
        max_frames=2,
        max_batch_size=1,
        **vars(sampling),
    )
    (request,) = loads.engine.requests
    assert (request.text, request.speaker, request.max_frames) == ("hello", 1, 2)
    assert request.sampling == sampling
    assert (tmp_path / "out.wav").read_bytes() == wav_file(
        expected_pcm("hello", 2, seed=7, cut=True)
    )


def test_greedy_is_temperature_zero(loads, tmp_path):
    assert say.main(["hello", "-o", str(tmp_path / "out.wav"), "--greedy"]) == 0
    assert loads.engine.requests[0].sampling == SamplingParams(temperature=0)


def test_the_engine_is_told_whether_to_normalise(loads, tmp_path):
    for flags in ([], ["--normalise", "on"]):
        assert say.main(["$5", "-o", str(tmp_path / "out.wav"), *flags]) == 0
    assert [request.normalise for request in loads.engine.requests] == ["auto", "on"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"hello\n", "hello"),
        (b"hello\r\n", "hello"),
        (b" two\nlines \n\n", " two\nlines \n"),
        ("Grüße".encode(), "Grüße"),
    ],
)
def test_without_text_stdin_is_read(content, text, loads, stdin, tmp_path):
    stdin(content)
    assert say.main(["-o", str(tmp_path / "out.wav")]) == 0
    assert loads.engine.requests[0].text == text


def test_a_text_may_begin_with_a_dash(loads, tmp_path):
    for argv in (["-5 degrees"], ["--", "--hello"]):
        assert say.main(["-o", str(tmp_path / "out.wav"), *argv]) == 0
    assert [request.text for request in loads.engine.requests] == ["-5 degrees", "--hello"]


def test_output_to_stdout(loads, capfdbinary):
    assert say.main(["hello", "-o", "-"]) == 0
    assert capfdbinary.readouterr().out == wav_file(expected_pcm("hello", 3))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["hello"], "give -o out.wav"),
        (["", "-o", "x.wav"], "there is no text"),
        ([" \n", "-o", "x.wav"], "there is no text"),
        (["bad \udcff byte", "-o", "x.wav"], "the text is not UTF-8"),
        (["hello", "-o", "x.wav", "--max_text_chars", "4"], "at most 4 characters, got 5"),
        (["hello", "-o", "x.wav", "--speaker", "2"], "--speaker: must be 0 to 1"),
        (["hello", "-o", "x.wav", "--temperature", "-1"], "--temperature: must be from 0 to 100"),
        (["hello", "-o", "x.wav", "--max_frames", "0"], "--max-frames: must be from 1 to 1000000"),
        (["hello", "-o", "x.wav", "--greedy", "--temperature", "0.5"], "--greedy"),
        (["hello", "-o", "x.wav", "--backend", "opencl"], "--backend: must be one of auto, native"),
        (["hello", "there", "-o", "x.wav"], "unrecognized arguments: there"),
        (["hello", "-o", "x.wav", "--port", "1"], "unrecognized arguments: --port"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(argv, said, no_loading, capsys):
    with pytest.raises(SystemExit) as stop:
        say.main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("say: error: ")
    assert said in line


@pytest.fixture
def forced():
    """Restores the forced backend after the test."""
    before = backend.forced()
    yield backend.forced
    backend.force(before)


@pytest.mark.parametrize(
    ("flags", "variable", "said"),
    [
        (["--backend", "triton"], "", "say: error: --backend triton: no such thing here"),
        (["--backend", "triton"], "reference", "say: error: --backend triton: no such thing here"),
        ([], "triton", "say: error: VOXKERN_BACKEND=triton: no such thing here"),
    ],
)
def test_a_backend_that_is_missing_is_one_line_and_code_2(
    flags, variable, said, forced, monkeypatch, tmp_path, capsys
):
    """The flag takes precedence over the variable; the model is not loaded."""
    monkeypatch.setattr(backend, "why_missing", lambda name, *_: REASONS[name])
    monkeypatch.setattr(loading, "load_engine", None)
    backend.force(variable or None)
    assert say.main(["hello", "-o", str(tmp_path / "out.wav"), *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [said]


REASONS = {"triton": "no such thing here", "reference": None, "native": None}


def test_a_backend_serves(forced, tmp_path, folder):
    argv = ["hello", "-o", str(tmp_path / "out.wav"), "--model", str(folder), "--max_frames", "1"]
    assert say.main([*argv, "--backend", "reference"]) == 0
    assert forced() == backend.backend_for("cpu", "linear") == "reference"


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff"])
def test_stdin_without_text_is_wrong_usage(content, no_loading, stdin, capsys):
    stdin(content)
    with pytest.raises(SystemExit) as stop:
        say.main(["-o", "x.wav"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unwritable_output_fails_before_the_work(no_loading, tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing" / "out.wav", tmp_path / "file" / "out.wav"):
        for argv in (["-o", str(path)], ["-o", "-", "--codes", str(path)]):
            assert say.main(["hello", *argv]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"say: error: cannot write {path}: ")


def test_an_engine_error_is_one_line(loads, tmp_path, capsys):
    out = tmp_path / "out.wav"
    assert say.main(["x" * 5000, "-o", str(out)]) == 1
    assert capsys.readouterr().err == "say: error: the prompt takes 5000 of 2000\n"
    loads.engine = FakeEngine(fail_at_step=2)
    assert say.main(["hello", "-o", str(out)]) == 1
    assert capsys.readouterr().err == "say: error: RuntimeError: the fake engine broke\n"
    assert not out.exists()


def test_a_terminal_gets_a_progress_bar(loads, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert say.main(["hello", "-o", str(tmp_path / "out.wav"), "--max_frames", "9"]) == 0
    assert "/9 [" in terminal.getvalue()


def test_speak_collects_codes_and_audio():
    from vox_serve.engine import Request

    audio, codes, reason = say.speak(FakeEngine(2), Request("hello"))
    assert reason == "stop"
    expected = np.concatenate([fake_audio("hello", None, i) for i in (0, 1)])
    np.testing.assert_array_equal(audio, expected)
    taken = []
    speech = say.speak(FakeEngine(2), Request("hello"), take=lambda _, part: taken.append(part))
    assert len(speech.audio) == 0
    np.testing.assert_array_equal(np.concatenate(taken), expected)
    assert codes.tolist() == [fake_codes("hello", i).tolist() for i in (0, 1)]


SHAPE = TinyShape(num_codebooks=5)


@pytest.fixture(scope="module")
def tiny():
    return build_tiny(SHAPE, seed=4)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("checkpoint"))


def test_a_checkpoint_gives_transformers_codes_and_audio(tiny, folder, tmp_path):
    wav, codes_path = tmp_path / "out.wav", tmp_path / "codes.npy"
    argv = ["--model", str(folder), "--greedy", "--dtype", "float32", "--max_frames", "6"]
    argv += ["--speaker", "1", "-o", str(wav), "--codes", str(codes_path)]
    assert say.main(["Hello there.", *argv]) == 0
    codes = torch.from_numpy(np.load(codes_path))
    assert torch.equal(codes, reference_generate(tiny, [Segment(1, "Hello there.")], 6))
    with wave.open(str(wav)) as reader:
        pcm = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
    valid = codes.clamp(max=SHAPE.audio_vocab_size - 4)
    audio = tiny.model.codec_model.decode(valid.T[None]).audio_values[0, 0].numpy()
    kept = slice(-FADE_SAMPLES)  # max_frames cuts the speech, so the rest fades
    expected = audio.clip(-1, 1 - 2**-15)
    np.testing.assert_allclose((pcm / 32768)[kept], expected[kept], atol=1e-4)


def test_a_context_file_comes_first(tiny, folder, tmp_path):
    context_codes = torch.randint(0, SHAPE.audio_vocab_size - 3, (4, SHAPE.num_codebooks))
    np.save(tmp_path / "a.npy", context_codes.numpy())
    context = tmp_path / "context.json"
    context.write_text('[{"speaker": 0, "text": "Who is it?", "codes": "a.npy"}]')
    argv = ["--model", str(folder), "--greedy", "--dtype=float32", "--max_frames=5"]
    argv += ["--context", str(context), "--codes", str(tmp_path / "codes.npy")]
    assert say.main(["Me.", *argv]) == 0
    segments = [Segment(0, "Who is it?", context_codes), Segment(0, "Me.")]
    expected = reference_generate(tiny, segments, 5)
    assert np.load(tmp_path / "codes.npy").tolist() == expected.tolist()


def test_the_same_seed_says_the_same(folder, tmp_path):
    def codes(*argv: str) -> list:
        path = str(tmp_path / "codes.npy")
        line = ["--model", str(folder), "--max_frames", "5", "--codes", path]
        assert say.main(["Hello.", *line, *argv]) == 0
        return np.load(path).tolist()

    assert codes("--seed", "1") == codes("--seed", "1") != codes("--seed", "2")


def test_an_unknown_model_is_one_line(tmp_path, capsys):
    assert say.main(["hello", "-o", str(tmp_path / "out.wav"), "--model", "./nowhere"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("say: error: ")
    assert "nowhere" in line


def test_a_prompt_beyond_the_context_is_one_line(folder, tmp_path, capsys):
    argv = ["--model", str(folder), "-o", str(tmp_path / "out.wav"), "--split_chars", "0"]
    assert say.main(["word " * 500, *argv]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(SHAPE.max_positions) in line
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_long_text_is_spoken_in_parts(folder, tmp_path):
    """`max_frames` holds for the whole; without it the parts' bounds do."""
    argv = ["--model", str(folder), "--seed", "3"]
    for name, more in (("all", []), ("some", ["--max_frames", "70"])):
        paths = ["-o", str(tmp_path / f"{name}.wav"), "--codes", str(tmp_path / f"{name}.npy")]
        assert say.main(["Some words here. " * 12, *argv, *paths, *more]) == 0
    whole, cut = (np.load(tmp_path / f"{name}.npy") for name in ("all", "some"))
    assert len(cut) == 70 < len(whole)
    np.testing.assert_array_equal(cut, whole[:70])
    with wave.open(str(tmp_path / "all.wav")) as file:
        assert file.getnframes() == len(whole) * 1920


def test_sampling_flags_are_the_servers():
    assert Config().sampling == SamplingParams()
