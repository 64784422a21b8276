"""A request's `context`: JSON to segments, and one line for what is wrong with it."""

import base64
import io
import json

import numpy as np
import pytest
import soundfile
import torch
from pydantic import BaseModel, ValidationError

from checkpoints import build_tiny
from limits import memory_limit
from vox_serve.context_field import (
    ContextField,
    ContextLimits,
    ContextTooLargeError,
    decode_context,
    encode_context,
    from_base64,
    parse_context,
)
from vox_serve.context_file import load_context
from vox_serve.context_segment import ContextError
from vox_serve.mimi import mimi_from_checkpoint
from vox_serve.model_config import CsmConfig

LIMITS = ContextLimits(max_bytes=200_000, max_s=10, max_text_chars=1000)
FORMATS = {
    "WAV": ("PCM_16", "PCM_24", "FLOAT", "ULAW"),
    "FLAC": ("PCM_24",),
    "OGG": ("VORBIS", "OPUS"),
    "MP3": ("MPEG_LAYER_III",),
}


@pytest.fixture(scope="module")
def mimi():
    tiny = build_tiny()
    prefix = "codec_model."
    tensors = {n.removeprefix(prefix): t for n, t in tiny.tensors.items() if n.startswith(prefix)}
    return mimi_from_checkpoint(tensors, tiny.config["codec_config"])


@pytest.fixture(scope="module")
def config() -> CsmConfig:
    return CsmConfig.from_json(build_tiny().config)


def noise(seconds: float, rate_hz: int = 24_000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, int(seconds * rate_hz))


def encoded(samples: np.ndarray, form: str = "WAV", subtype: str = "PCM_16", rate_hz=24_000) -> str:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, subtype, format=form)
    return base64.b64encode(file.getvalue()).decode()


def turn(**speech) -> dict:
    return {"speaker": 1, "text": "eins", **speech}


def read(value, mimi, config, limits=LIMITS):
    turns = decode_context(parse_context(value), config, mimi.config, limits)
    return encode_context(turns, lambda audio: encoded_by(mimi, audio, config))


def encoded_by(mimi, audio, config):
    return mimi.encode(torch.from_numpy(audio)[None], config.num_codebooks)[0]


def test_audio_and_codes(mimi, config):
    codes = np.random.default_rng(1).integers(0, 67, (3, 4)).tolist()
    value = [turn(audio=encoded(noise(0.5))), {"speaker": 0, "text": "三", "codes": codes}]
    segments = read(value, mimi, config)
    assert [(s.speaker, s.text) for s in segments] == [(1, "eins"), (0, "三")]
    samples = np.rint(noise(0.5) * 32768) / 32768
    expected = mimi.encode(torch.from_numpy(samples).float()[None], 4)[0]
    assert torch.equal(segments[0].codes[: len(expected)], expected)
    assert segments[1].codes.tolist() == codes
    as_form_field = read(json.dumps(value), mimi, config)
    for a, b in zip(segments, as_form_field, strict=True):
        assert torch.equal(a.codes, b.codes)


def test_a_request_and_a_file_give_the_same_codes(tmp_path, mimi, config):
    soundfile.write(tmp_path / "a.flac", np.pad(noise(1), (9000, 9000)), 44_100)
    audio = base64.b64encode((tmp_path / "a.flac").read_bytes()).decode()
    (tmp_path / "context.json").write_text(json.dumps([turn(audio="a.flac")]))
    (from_file,) = load_context(tmp_path / "context.json", mimi, config)
    (from_request,) = read([turn(audio=audio)], mimi, config)
    assert torch.equal(from_file.codes, from_request.codes)


@pytest.mark.parametrize(
    ("form", "subtype"), [(form, subtype) for form, subs in FORMATS.items() for subtype in subs]
)
def test_formats(mimi, config, form, subtype):
    audio = encoded(noise(0.5, 48_000), form, subtype, 48_000)
    (segment,) = read([turn(audio=audio)], mimi, config)
    assert 7 <= len(segment.codes) <= 8


@pytest.mark.parametrize(
    "spelled",
    [
        lambda audio: f"data:audio/wav;base64,{audio}",
        lambda audio: f"DATA:;Base64,{audio}",
        lambda audio: f"data:audio/ogg;codecs=opus;base64,{audio}",
        lambda audio: "\r\n".join(audio[i : i + 76] for i in range(0, len(audio), 76)),
    ],
    ids=["data URL", "bare data URL", "data URL with parameters", "lines"],
)
def test_spellings_of_base64(mimi, config, spelled):
    audio = encoded(noise(0.5))
    (plain,), (other,) = (read([turn(audio=a)], mimi, config) for a in (audio, spelled(audio)))
    assert torch.equal(plain.codes, other.codes)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


AUDIO = encoded(noise(0.5))
WRONG = [
    ("[", "context cannot be read as JSON: "),
    ("\ud800", "context must be valid Unicode"),
    ({}, "context must be a list of segments"),
    ([turn()], "context[0]: give either audio or codes"),
    ([turn(audio=AUDIO, codes=[[0, 0, 0, 0]])], "context[0]: give either audio or codes"),
    ([turn(audio=AUDIO), 5], "context[1]: must be an object"),
    ([turn(audio=AUDIO, emotion=1)], "context[0].emotion is no field"),
    ([turn(audio=AUDIO) | {"speaker": -1}], "context[0].speaker must be a whole number"),
    ([turn(audio=AUDIO) | {"speaker": True}], "context[0].speaker must be a whole number"),
    ([turn(audio=AUDIO) | {"speaker": deep(5000)}], "context[0].speaker must be a whole number"),
    ([turn(audio=AUDIO) | {"text": " "}], "context[0].text must be a string"),
    ([turn(audio=AUDIO) | {"text": "\ud800"}], "context[0].text must be valid Unicode"),
    ([turn(audio=AUDIO) | {"text": "x" * 1001}], "context[0].text must have at most 1000 char"),
    ([turn(audio=5)], "context[0].audio must be a recording in base64"),
    ([turn(audio="")], "context[0].audio must be a recording in base64"),
    ([turn(audio="ä")], "context[0].audio: it is not base64"),
    ([turn(audio="QUJ")], "context[0].audio: it is not base64"),
    ([turn(audio="data:audio/wav,x")], "context[0].audio: a data: URL must be one of base64"),
    ([turn(audio="data:" + "x" * 99)], "context[0].audio: a data: URL must be one of base64"),
    ([turn(audio="data:;base64,")], "context[0].audio: "),
    ([turn(audio=base64.b64encode(b"/etc/passwd").decode())], "context[0].audio: the recording "),
    ([turn(audio=base64.b64encode(b"fLaC" * 9).decode())], "context[0].audio: cannot read audio"),
    (
        [turn(audio=encoded(noise(0.1, 192_000), "FLAC", rate_hz=192_000))],
        "context[0].audio: the recording has 192000 samples per second, accepted are 8000 to 96000",
    ),
    (
        [turn(audio=encoded(np.stack([noise(0.3)] * 9, 1)))],
        "context[0].audio: the recording has 9 channels, accepted are 1 to 8",
    ),
    ([turn(audio=encoded(noise(0.01)))], "context[0].audio: the recording is 10 ms long"),
    ([turn(audio=encoded(0 * noise(1)))], "context[0].audio: the recording is silent"),
    ([turn(audio=encoded(noise(11, 8000), "WAV", "ULAW", 8000))], "11 s long; at most 10 s fit"),
    (
        [turn(audio=encoded(noise(6, 8000), "WAV", "ULAW", 8000))] * 2,
        "context[1].audio: the recording is 6 s long; at most 4 s fit",
    ),
    ([turn(audio=AUDIO)] * 257, "context has 257 segments, more than"),
    ([turn(codes="a.npy")], "context[0].codes must be a list of frames"),
    ([turn(codes=[])], "context[0].codes must be a list of frames"),
    ([turn(codes=[[0] * 4, 5])], "context[0].codes: frame 1 must be a list of 4 codes"),
    ([turn(codes=[[0] * 5])], "context[0].codes: frame 0 must be a list of 4 codes, got 5"),
    ([turn(codes=[[0, 0, 0, 67]])], "frame 0: codes must be whole numbers from 0 to 66, got 67"),
    ([turn(codes=[[0, 0, 0, -1]])], "codes must be whole numbers from 0 to 66, got -1"),
    ([turn(codes=[[0, 0, 0, 1.0]])], "codes must be whole numbers from 0 to 66, got 1.0"),
    ([turn(codes=[[0, 0, 0, True]])], "codes must be whole numbers from 0 to 66, got True"),
    ([turn(codes=[[0, 0, 0, 10**400]])], "codes must be whole numbers from 0 to 66"),
    ([turn(codes=[[0] * 4] * 257)], "context[0].codes: there are 257 frames"),
    ([turn(codes=[[0] * 4] * 100)] * 3, "context[2]: the segments up to here have 300 frames"),
]


@pytest.mark.parametrize(("value", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrong_contexts_name_entry_and_field(mimi, config, value, said):
    with memory_limit(), pytest.raises(ContextError) as error:
        read(value, mimi, config)
    message = str(error.value)
    assert said in message
    assert message.startswith("context")
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("count", [1, 2])
def test_bytes_are_bounded_before_they_are_decoded(mimi, config, count, monkeypatch):
    audio = encoded(noise(0.5))
    num_bytes = len(base64.b64decode(audio))
    limits = ContextLimits(max_bytes=count * num_bytes, max_s=10, max_text_chars=1000)
    assert len(read([turn(audio=audio)] * count, mimi, config, limits)) == count
    with pytest.raises(ContextTooLargeError, match=rf"context\[{count}\].audio: .* bytes; at most"):
        read([turn(audio=audio)] * (count + 1), mimi, config, limits)
    limits = ContextLimits(max_bytes=num_bytes - 1, max_s=10, max_text_chars=1000)
    with pytest.raises(ContextTooLargeError, match=f"{num_bytes} bytes; at most {num_bytes - 1}"):
        read([turn(audio=audio)], mimi, config, limits)
    monkeypatch.setattr(base64, "b64decode", None)
    with pytest.raises(ContextTooLargeError):
        read([turn(audio="A" * 4 * num_bytes)], mimi, config, limits)


def test_in_a_request_model():
    class Body(BaseModel):
        context: ContextField | None = None

    value = [turn(codes=[[0, 0, 0, 0]])]
    assert Body.model_validate({"context": value}).context[0].speech == [[0, 0, 0, 0]]
    assert Body.model_validate_strings({"context": json.dumps(value)}).context[0].speaker == 1
    assert Body.model_validate({}).context is None
    with pytest.raises(ValidationError, match=r"context\[0\]: give either") as error:
        Body.model_validate({"context": [turn()]})
    assert error.value.errors()[0]["loc"] == ("context",)
    schema = Body.model_json_schema()["properties"]["context"]["anyOf"][0]
    assert schema["type"] == "array"
    assert [set(kind["properties"]) for kind in schema["items"]["oneOf"]] == [
        {"speaker", "text", "audio"},
        {"speaker", "text", "codes"},
    ]


@pytest.mark.parametrize("num_bytes", [1, 3 * 2**16 - 1, 3 * 2**16, 3 * 2**16 + 1, 500_000])
def test_long_base64_is_decoded_whole(num_bytes):
    data = np.random.default_rng(num_bytes).bytes(num_bytes)
    text = base64.b64encode(data).decode()
    assert from_base64(text, num_bytes) == data
    for wrong in (f"{text}AAAA" if "=" in text else f"{text}A", f"={text}"):
        with pytest.raises(ValueError, match="not base64"):
            from_base64(wrong, 2 * num_bytes + 8)
