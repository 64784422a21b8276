"""Context from recordings and code files, compared with the codec's encoding."""

import json

import numpy as np
import pytest
import soundfile
import torch

from checkpoints import build_tiny
from vox_serve.context_file import DEFAULT_PROMPTS, ContextError, default_context, load_context
from vox_serve.mimi import mimi_from_checkpoint
from vox_serve.model_config import CsmConfig
from vox_serve.recording import read_audio


@pytest.fixture(scope="module")
def mimi():
    tiny = build_tiny()
    prefix = "codec_model."
    tensors = {n.removeprefix(prefix): t for n, t in tiny.tensors.items() if n.startswith(prefix)}
    return mimi_from_checkpoint(tensors, tiny.config["codec_config"])


@pytest.fixture(scope="module")
def config() -> CsmConfig:
    return CsmConfig.from_json(build_tiny().config)


def write_noise(path, seconds: float, rate_hz: int = 24000, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, (int(seconds * rate_hz), channels))
    soundfile.write(path, noise, rate_hz, "PCM_16")


def transformers_codes(path) -> torch.Tensor:
    """transformers' codes of the recording, padded to whole frames first."""
    audio = torch.from_numpy(read_audio(path))
    audio = torch.nn.functional.pad(audio, (0, -len(audio) % 1920))
    return build_tiny().model.codec_model.encode(audio[None, None]).audio_codes[0].T


def test_load_context(tmp_path, mimi, config):
    write_noise(tmp_path / "sub" / "a.wav", 0.5)
    write_noise(tmp_path / "b.wav", 0.33, rate_hz=44100, channels=2)
    codes = np.random.default_rng(1).integers(0, 67, (3, 4))
    np.save(tmp_path / "c.npy", codes)
    entries = [
        {"speaker": 0, "text": "one", "audio": "sub/a.wav"},
        {"speaker": 1, "text": "zwei", "audio": str(tmp_path / "b.wav")},
        {"speaker": 0, "text": "三", "codes": "c.npy"},
    ]
    (tmp_path / "context.json").write_text(json.dumps(entries), encoding="utf-8")
    segments = load_context(tmp_path / "context.json", mimi, config)
    assert [(s.speaker, s.text) for s in segments] == [(0, "one"), (1, "zwei"), (0, "三")]
    assert segments[0].codes.shape == (7, 4)
    assert torch.equal(segments[0].codes, transformers_codes(tmp_path / "sub" / "a.wav"))
    assert torch.equal(segments[1].codes, transformers_codes(tmp_path / "b.wav"))
    assert torch.equal(segments[2].codes, torch.from_numpy(codes))


def test_default_context_is_a_then_b(tmp_path, mimi, config):
    assert default_context(tmp_path, mimi, config) == []
    write_noise(tmp_path / "prompts" / "conversational_a.wav", 0.2)
    assert default_context(tmp_path, mimi, config) == []
    write_noise(tmp_path / "prompts" / "conversational_b.wav", 0.4)
    a, b = default_context(tmp_path, mimi, config)
    assert (a.speaker, a.text) == (0, DEFAULT_PROMPTS[0][1])
    assert (b.speaker, b.text) == (1, DEFAULT_PROMPTS[1][1])
    for segment, name in ((a, "a"), (b, "b")):
        path = tmp_path / "prompts" / f"conversational_{name}.wav"
        assert torch.equal(segment.codes, transformers_codes(path))


def test_default_context_that_cannot_be_read(tmp_path, mimi, config):
    write_noise(tmp_path / "prompts" / "conversational_a.wav", 0.2)
    (tmp_path / "prompts" / "conversational_b.wav").write_text("no audio")
    with pytest.raises(ContextError, match=r"conversational_b.wav"):
        default_context(tmp_path, mimi, config)


GOOD = {"speaker": 0, "text": "a", "codes": "good.npy"}


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ("text", "must be an object"),
        ({"text": "a", "codes": "good.npy"}, "speaker must be"),
        (GOOD | {"speaker": -1}, "speaker must be"),
        (GOOD | {"speaker": True}, "speaker must be"),
        (GOOD | {"speaker": "0"}, "speaker must be"),
        ({"speaker": 0, "codes": "good.npy"}, "text must be"),
        (GOOD | {"text": " "}, "text must be"),
        (GOOD | {"text": 5}, "text must be"),
        (GOOD | {"audio": "a.wav"}, "give either audio or codes"),
        ({"speaker": 0, "text": "a"}, "give either audio or codes"),
        (GOOD | {"codes": 5}, "codes must be the path"),
        (GOOD | {"emotion": "sad"}, "emotion is no field"),
        (GOOD | {"codes": "gone.npy"}, r"codes: .*gone.npy: there is no such file"),
        (GOOD | {"codes": "text.npy"}, r"codes: .*text.npy"),
        (GOOD | {"codes": "object.npy"}, r"codes: .*object.npy"),
        (GOOD | {"codes": "float.npy"}, r"codes: .*int64 \[N, 4\], got float64"),
        (GOOD | {"codes": "unsigned.npy"}, r"codes: .*got uint16"),
        (GOOD | {"codes": "flat.npy"}, r"codes: .*got int64 \[12\]"),
        (GOOD | {"codes": "wide.npy"}, r"codes: .*got int64 \[3, 5\]"),
        (GOOD | {"codes": "high.npy"}, r"codes: .*0 to 66, got 67 to 67"),
        ({"speaker": 0, "text": "a", "audio": "gone.wav"}, r"audio: .*gone.wav"),
        ({"speaker": 0, "text": "a", "audio": "text.npy"}, r"audio: .*text.npy"),
    ],
)
def test_wrong_entries_name_index_and_field(tmp_path, mimi, config, entry, match):
    files = {
        "good": np.zeros((3, 4), np.int64),
        "object": np.array([{}], dtype=object),
        "float": np.zeros((3, 4)),
        "unsigned": np.zeros((3, 4), np.uint16),
        "flat": np.zeros(12, np.int64),
        "wide": np.zeros((3, 5), np.int64),
        "high": np.full((3, 4), 67),
    }
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "text.npy").write_text("neither codes nor audio")
    path = tmp_path / "context.json"
    path.write_text(json.dumps([GOOD, entry]))
    with pytest.raises(ContextError, match=rf"context.json, entry 1: {match}") as error:
        load_context(path, mimi, config)
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path, mimi, config):
    path = tmp_path / "context.json"
    with pytest.raises(ContextError, match="no such file"):
        load_context(path, mimi, config)
    path.write_text("[")
    with pytest.raises(ContextError, match="cannot be read as JSON"):
        load_context(path, mimi, config)
    path.write_text("{}")
    with pytest.raises(ContextError, match="must be a list"):
        load_context(path, mimi, config)
    path.write_text("[]")
    assert load_context(path, mimi, config) == []
