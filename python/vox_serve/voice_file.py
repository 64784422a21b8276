"""A voice and its file: encoded recordings with their transcripts, in safetensors."""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save

from vox_serve.json_file import parse_json
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import Segment

NAME_PATTERN = r"(?![0-9]+$)[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""A name that is a file's name in any folder. Digits alone would be a speaker."""
NAME_RULE = "1 to 64 letters a-z, digits, - or _, not - or _ first, not digits alone"

MAX_RECORDINGS = 16
MAX_FILE_BYTES = 8 << 20


_FORMAT = 1
_METADATA_KEY = "voxkern_voice"
_DTYPES = {"I16": np.dtype("<i2"), "I32": np.dtype("<i4")}

Count = Annotated[int, Field(ge=1, lt=2**31)]


class VoiceError(ValueError):
    """An invalid voice or name; the message says which."""


class Sizes(NamedTuple):
    """The sizes that a voice shares with the model that speaks it."""

    num_codebooks: int
    audio_vocab_size: int

    @classmethod
    def of(cls, config: CsmConfig) -> "Sizes":
        return cls(config.num_codebooks, config.audio_vocab_size)


@dataclass(frozen=True)
class Voice:
    """A voice.

    Attributes:
        name: as it was given; names that differ by case alone are the same voice.
        speaker: the speaker of all segments, 0 or more.
        segments: the recordings, codes `[N, K]` int64, with their transcripts.
        sizes: of the model that it was made for.
        created: Unix time, in whole seconds.
        frame_s: duration of a frame.
        levels_dbfs: level of each segment's speech; None where it is not known.
        preview: `[S]` int16, the beginning of the decoded codes.
        sample_rate_hz: of the preview.
    """

    name: str
    speaker: int
    segments: tuple[Segment, ...]
    sizes: Sizes
    created: int
    frame_s: float
    levels_dbfs: tuple[float | None, ...]
    preview: np.ndarray
    sample_rate_hz: int

    def seconds(self, segment: Segment) -> float:
        """Duration of one of the segments."""
        assert segment.codes is not None
        return round(len(segment.codes) * self.frame_s, 3)


class _SegmentInfo(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    transcript: str = Field(min_length=1)
    level_dbfs: float | None = None


class _Info(BaseModel):
    """The metadata of a voice's file."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    format: int
    name: str
    speaker: int = Field(ge=0, lt=2**31)
    created: int = Field(ge=0, lt=2**53)
    num_codebooks: Count
    audio_vocab_size: Count
    frame_s: float = Field(gt=0, le=10)
    sample_rate_hz: Count
    segments: list[_SegmentInfo] = Field(min_length=1, max_length=MAX_RECORDINGS)


def voice_key(name: str) -> str:
    """The name by which a voice is stored: in lower case, since not all file systems tell cases
    apart.

    Raises:
        VoiceError: no voice can have this name.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise VoiceError(f"a voice's name must be {NAME_RULE}, got {name[:100]!a}")
    return name.lower()


def voice_to_bytes(voice: Voice) -> bytes:
    """The content of a voice's file."""
    segments = [
        _SegmentInfo(transcript=segment.text, level_dbfs=level)
        for segment, level in zip(voice.segments, voice.levels_dbfs, strict=True)
    ]
    info = _Info(
        format=_FORMAT,
        name=voice.name,
        speaker=voice.speaker,
        created=voice.created,
        frame_s=voice.frame_s,
        sample_rate_hz=voice.sample_rate_hz,
        segments=segments,
        **voice.sizes._asdict(),
    )
    dtype: Any = _DTYPES["I16" if voice.sizes.audio_vocab_size <= 2**15 else "I32"]
    tensors = {"preview": np.ascontiguousarray(voice.preview, dtype="<i2")}
    for i, segment in enumerate(voice.segments):
        assert segment.codes is not None
        tensors[f"codes.{i}"] = segment.codes.numpy().astype(dtype)
    return save(tensors, metadata={_METADATA_KEY: json.dumps(info.model_dump())})


def voice_from_bytes(data: bytes) -> Voice:
    """A voice from the content of its file.

    Raises:
        VoiceError: it holds no voice; the message says why.
    """
    try:
        tensors = {
            name: _array(name, tensor)
            for name, tensor in safetensors.deserialize(data)
            if name == "preview" or name.startswith("codes.")
        }
        # The library has checked the header's length.
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = (header.get("__metadata__") or {}).get(_METADATA_KEY)
        if text is None:
            raise VoiceError(f"it is no voice: its metadata has no {_METADATA_KEY}")
        value = parse_json(text.encode())
        version = value.get("format") if isinstance(value, dict) else None
        if version != _FORMAT:
            raise VoiceError(f"it has format {version!r:.100}, this version reads {_FORMAT}")
        info = _Info.model_validate(value)
    except safetensors.SafetensorError as error:
        raise VoiceError(f"it is no safetensors file: {error}") from None
    except ValidationError as errors:
        first = errors.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise VoiceError(f"{where}: {first['msg'].lower()}") from None
    except VoiceError:
        raise
    except ValueError as error:
        raise VoiceError(f"its metadata cannot be read: {error}") from None
    sizes = Sizes(info.num_codebooks, info.audio_vocab_size)
    segments = []
    for i, segment in enumerate(info.segments):
        codes = tensors.get(f"codes.{i}")
        if codes is None:
            raise VoiceError(f"codes.{i} is missing")
        if codes.ndim != 2 or codes.shape[1] != sizes.num_codebooks or not len(codes):
            raise VoiceError(
                f"codes.{i} must be [N, {sizes.num_codebooks}], but is {list(codes.shape)}"
            )
        if not 0 <= codes.min() <= codes.max() < sizes.audio_vocab_size:
            raise VoiceError(f"codes.{i} must be 0 to {sizes.audio_vocab_size - 1}")
        if not segment.transcript.strip():
            raise VoiceError(f"segments.{i}.transcript must not be blank")
        tensor = torch.from_numpy(codes.astype(np.int64))
        segments.append(Segment(info.speaker, segment.transcript, tensor))
    preview = tensors.get("preview")
    if preview is None or preview.ndim != 1 or preview.dtype != np.int16:
        raise VoiceError("preview must be int16 [S]")
    return Voice(
        name=info.name,
        speaker=info.speaker,
        segments=tuple(segments),
        sizes=sizes,
        created=info.created,
        frame_s=info.frame_s,
        levels_dbfs=tuple(segment.level_dbfs for segment in info.segments),
        preview=preview,
        sample_rate_hz=info.sample_rate_hz,
    )


def _array(name: str, tensor: dict[str, Any]) -> np.ndarray:
    dtype: Any = _DTYPES.get(tensor["dtype"])
    if dtype is None:
        raise VoiceError(f"{name} has dtype {tensor['dtype']}, expected I16 or I32")
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
