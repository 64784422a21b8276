"""Fuzz targets: each reads bytes as one kind of input, and may raise what its reader documents.

An input is a finding if it raises anything else, takes more than `MEMORY_BYTES`, or runs for more
than `TIMEOUT_S`.
"""

import asyncio
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from safetensors.torch import save_file
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer

from limits import memory_limit
from vox_serve.api import GenerateRequest
from vox_serve.audio import pcm16, wav_file
from vox_serve.checkpoint import CheckpointError, TensorFiles
from vox_serve.config import Config, ConfigError
from vox_serve.context_field import (
    ContextLimits,
    decode_context,
    encode_context,
    parse_context,
)
from vox_serve.context_file import load_context
from vox_serve.context_segment import ContextError
from vox_serve.http_io import read_fields
from vox_serve.mimi import Mimi, load_mimi, mimi_from_checkpoint
from vox_serve.model_config import CsmConfig
from vox_serve.model_files import prompt_builder
from vox_serve.prompt import PromptBuilder, Segment, check_codes
from vox_serve.prompt_audio import PromptOptions, clean_prompt
from vox_serve.recording import AudioError, Limits, decode, read_audio
from vox_serve.runner import RequestRefused
from vox_serve.text.normalising import normalise
from vox_serve.text.splitting import PREFERRED_CHARS, SentenceStream, split
from vox_serve.voice_file import VoiceError, voice_from_bytes, voice_to_bytes
from vox_serve.voice_maker import VoiceMaker
from vox_serve.voice_routes import read_excerpts, read_upload
from vox_serve.weights import load_checkpoint

MEMORY_BYTES = 2 << 30
TIMEOUT_S = 20
HERE = Path(__file__).parent
SPOKEN = "Hello, wörld! 123 aaaaaaaaaaaaaaaaaaaa \n"
CONTENT_TYPES = (
    "application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=b",
    "multipart/form-data",
    "text/plain",
    "",
)
"""The first byte of an HTTP input chooses one of these."""


def _seed(name: str) -> bytes:
    return (HERE / "corpus" / name).read_bytes()


@cache
def _tensors() -> dict[str, torch.Tensor]:
    """Tensors of the tiny checkpoint that corpus/config_json/hf describes."""
    shapes = json.loads((HERE / "shapes.json").read_text())
    torch.manual_seed(0)
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


@cache
def _folder(name: str = "model") -> Path:
    """A checkpoint on which each input replaces one file. Made without transformers, whose import
    takes longer than many inputs."""
    folder = Path(tempfile.mkdtemp(prefix="voxkern-fuzz-")) / name
    folder.mkdir()
    save_file(_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_bytes(_seed("config_json/hf"))
    (folder / "tokenizer.json").write_bytes(_seed("tokenizer_json/tiny"))
    sound = np.random.default_rng(0).normal(0, 0.1, 4800)
    (folder.parent / "a.wav").write_bytes(wav_file(pcm16(sound).tobytes()))
    (folder.parent / "a.npy").write_bytes(_seed("codes_npy/codes.npy"))
    return folder


@cache
def _config() -> CsmConfig:
    return CsmConfig.from_json(json.loads(_seed("config_json/hf")))


@cache
def _mimi() -> Mimi:
    prefix = "codec_model."
    tensors = {n.removeprefix(prefix): t for n, t in _tensors().items() if n.startswith(prefix)}
    return mimi_from_checkpoint(tensors, json.loads(_seed("config_json/hf"))["codec_config"])


@cache
def _adapter() -> Path:
    """An adapter of the model in `_folder("base")`, of which each input replaces one file."""
    folder = _folder("base").parent / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(_seed("adapter_config/small"))
    (folder / "adapter_model.safetensors").write_bytes(_seed("adapter_tensors/small"))
    return folder


def set_up() -> None:
    """Make what the targets share, so that no input is charged for it."""
    _folder()
    _adapter()
    _mimi()


def _written(name: str, data: bytes) -> Path:
    path = _folder().parent / name
    path.write_bytes(data)
    return path


def audio(data: bytes) -> None:
    """A recording: WAV, FLAC, OGG, MP3, AIFF, ..."""
    with suppress(AudioError):
        samples = read_audio(_written("audio.wav", data), max_s=5)
        assert 0 < len(samples) <= 5 * 24_000 + 1
    with suppress(AudioError):
        recording = decode(data, Limits(max_s=5, max_bytes=1 << 16, common_only=True))
        prompt = clean_prompt(recording, 24_000, 1920, PromptOptions(min_s=0.001))
        assert 0 < len(prompt) <= 5 * 24_000 + 2 * 1920
        assert len(prompt) % 1920 == 0
        assert np.abs(prompt).max() <= 1


def safetensors(data: bytes) -> None:
    """A model's and a codec's tensor file."""
    path = _written("a.safetensors", data)
    with suppress(CheckpointError):
        files = TensorFiles([path])
        for name in files.names:
            with suppress(CheckpointError):
                assert files.read(name).nbytes <= len(data)
    with suppress(ValueError):
        load_mimi(path)


def state_dict(data: bytes) -> None:
    """A pickled checkpoint."""
    path = _written("a.pt", data)
    with suppress(CheckpointError):
        files = TensorFiles([path])
        for name in files.names:
            with suppress(CheckpointError):
                assert files.read(name).nbytes <= len(data)


def gguf(data: bytes) -> None:
    """A model in a GGUF file: its tensors, sizes, codec and tokenizer."""
    path = _written("a.gguf", data)
    with suppress(CheckpointError):
        files = TensorFiles([path])
        for name in files.names:
            with suppress(CheckpointError):
                # Blocks of 3 bits become 32; a codebook's usage is made up.
                assert files.read(name).nbytes <= 16 * len(data)
    with suppress(ValueError):
        checkpoint = load_checkpoint(path, torch.float32)
        mimi_from_checkpoint(checkpoint.codec_tensors or {}, checkpoint.codec_config).init_state()
    with suppress(ValueError):
        prompt_builder(path, _config()).tokens(Segment(0, SPOKEN))


def config_json(data: bytes) -> None:
    """config.json beside a checkpoint's true weights."""
    (_folder() / "config.json").write_bytes(data)
    with suppress(ValueError):
        checkpoint = load_checkpoint(_folder(), torch.float32)
        checkpoint.config.backbone.rope_table()
        checkpoint.config.depth.rope_table()
        mimi_from_checkpoint(checkpoint.codec_tensors or {}, checkpoint.codec_config).init_state()


def _load_adapter(name: str, data: bytes) -> None:
    """Load the model with an adapter whose file `name` is the input."""
    path = _adapter() / name
    valid = path.read_bytes()
    path.write_bytes(data)
    try:
        with suppress(CheckpointError):
            load_checkpoint(_folder("base"), torch.float32, adapter=_adapter())
    finally:
        path.write_bytes(valid)


def adapter_config(data: bytes) -> None:
    """adapter_config.json beside an adapter's true tensors."""
    _load_adapter("adapter_config.json", data)


def adapter_tensors(data: bytes) -> None:
    """An adapter's tensors beside its true adapter_config.json."""
    _load_adapter("adapter_model.safetensors", data)


def tokenizer_json(data: bytes) -> None:
    """tokenizer.json, and a text that it tokenizes."""
    (_folder() / "tokenizer.json").write_bytes(data)
    with suppress(CheckpointError, ValueError):
        prompts = PromptBuilder.from_folder(_folder(), _config())
        prompts.tokens(Segment(0, SPOKEN))


def context_json(data: bytes) -> None:
    """context.json beside a recording and codes."""
    with suppress(ContextError):
        load_context(_written("context.json", data), _mimi(), _config())


def _encode(audio: np.ndarray) -> torch.Tensor:
    return _mimi().encode(torch.from_numpy(audio)[None], _config().num_codebooks)[0]


def context_field(data: bytes) -> None:
    """A request's context, down to its codes."""
    limits = ContextLimits(max_bytes=1 << 16, max_s=5, max_text_chars=1000)
    with suppress(ContextError):
        segments = parse_context(data.decode("utf-8", "surrogateescape"))
        turns = decode_context(segments, _config(), _mimi().config, limits)
        for segment in encode_context(turns, _encode):
            check_codes(segment.codes, _config())


def codes_npy(data: bytes) -> None:
    """A .npy file of codes."""
    _written("fuzzed.npy", data)
    text = '[{"speaker": 0, "text": "hi", "codes": "fuzzed.npy"}]'
    with suppress(ContextError):
        load_context(_written("codes.json", text.encode()), _mimi(), _config())


def voice_file(data: bytes) -> None:
    """A voice's file."""
    with suppress(VoiceError):
        voice = voice_from_bytes(data)
        assert sum(segment.codes.numel() for segment in voice.segments) <= len(data)
        again = voice_from_bytes(voice_to_bytes(voice))
        assert again.name == voice.name
        assert [s.text for s in again.segments] == [s.text for s in voice.segments]


def voice_upload(data: bytes) -> None:
    """The body of a request that adds a voice, by the first byte's content type, down to the
    recordings."""
    kind = CONTENT_TYPES[data[0] % len(CONTENT_TYPES)] if data else ""

    async def receive() -> dict:
        return {"type": "http.request", "body": data[1:], "more_body": False}

    headers = [(b"content-type", kind.encode())] if kind else []
    scope = {"type": "http", "method": "POST", "path": "/v1/audio/voices", "headers": headers}
    scope |= {"query_string": b"", "app": None}
    with suppress(VoiceError, RequestValidationError):
        try:
            upload = asyncio.run(read_upload(Request(scope, receive), Config()))
        except HTTPException as error:
            if not 400 <= error.status_code < 500:
                raise
            return
        prompts = PromptBuilder(Tokenizer.from_buffer(_seed("tokenizer_json/tiny")), _config())
        read_excerpts(upload.recordings, VoiceMaker(_mimi(), prompts))


def http_body(data: bytes) -> None:
    """A request's body, by the first byte's content type, down to the engine's request."""
    kind = CONTENT_TYPES[data[0] % len(CONTENT_TYPES)] if data else ""

    async def receive() -> dict:
        return {"type": "http.request", "body": data[1:], "more_body": False}

    headers = [(b"content-type", kind.encode())] if kind else []
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers}
    scope |= {"query_string": b"", "app": None}
    try:
        fields, is_form = asyncio.run(read_fields(Request(scope, receive), 262_144))
    except HTTPException as error:
        if not 400 <= error.status_code < 500:
            raise
        return
    validate = GenerateRequest.model_validate_strings if is_form else GenerateRequest.model_validate
    with suppress(ValidationError, ConfigError, RequestRefused):
        validate(fields).to_engine(Config())


def text(data: bytes) -> None:
    """A text, normalised, split, and split as it arrives."""
    text = data.decode("utf-8", "replace")
    spoken = normalise(text)
    assert normalise(spoken) == spoken
    for max_chars in (3, 40, 1000):
        parts = split(text, max_chars)
        assert "".join("".join(parts).split()) == "".join(text.split())
        stream = SentenceStream(max_chars, PREFERRED_CHARS)
        found = [part for i in range(0, len(text), 7) for part in stream.feed(text[i : i + 7])]
        assert found + stream.end() == parts


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        audio,
        safetensors,
        state_dict,
        gguf,
        config_json,
        adapter_config,
        adapter_tensors,
        tokenizer_json,
        context_json,
        context_field,
        codes_npy,
        voice_file,
        voice_upload,
        http_body,
        text,
    )
}


def run(name: str, data: bytes) -> None:
    """Run one input of a target within the memory limit."""
    with memory_limit(MEMORY_BYTES):
        TARGETS[name](data)
