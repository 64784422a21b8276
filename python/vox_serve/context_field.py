"""A request's `context`: earlier turns with their speech, as JSON.

Three steps, so that each can run where it belongs: `parse_context` checks the fields and is cheap;
`decode_context` decodes base64 and recordings and touches no model; `encode_context` calls
the codec's encoder.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import PlainValidator, WithJsonSchema
from torch import Tensor

from vox_serve.context_segment import ContextError, Place, SegmentFields, check_segment
from vox_serve.json_file import bounded_int, check_items, parse_json, shown
from vox_serve.mimi.config import MimiConfig
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import Segment
from vox_serve.prompt_audio import PromptOptions, clean_prompt
from vox_serve.recording import AudioTooLargeError, Limits, decode
from vox_serve.text_bound import check_length

RATES_HZ = (8_000, 96_000)
MAX_CHANNELS = 8
"""Bounds of uploads. 160 s of 8 channels at 96 kHz take 3 s and 250 MB to decode; files may have
four times the rate and eight times the channels."""
MAX_SEGMENTS = 4096
"""Most segments of a context. A model's context has room for fewer."""
_BASE64_SLICE_CHARS = 1 << 18  # divisible by 4


class ContextTooLargeError(ContextError):
    """The recordings of a context have more bytes than are accepted."""


@dataclass(frozen=True)
class ContextLimits:
    """Bounds on a request's context.

    Attributes:
        max_bytes: most bytes of all recordings together, encoded.
        max_s: most seconds of all recordings together, with their silence. The model's context
            holds too.
        max_text_chars: longest text of a segment.
    """

    max_bytes: int
    max_s: float
    max_text_chars: int


@dataclass(frozen=True)
class Turn:
    """A segment whose speech is decoded.

    Attributes:
        speaker: 0 or more.
        text: of the segment.
        audio: `[S]` float32 at the codec's rate, whole frames; None if there are codes.
        codes: `[N, K]` int64; None if there is audio.
    """

    speaker: int
    text: str
    audio: np.ndarray | None = None
    codes: Tensor | None = None


def parse_context(value: Any, files: Sequence[bytes] = ()) -> list[SegmentFields]:
    """Check a request's `context`, all but the content of recordings and codes.

    Args:
        value: a list of `{"speaker", "text", "audio" | "codes"}`; or that list as JSON text, in
            which a form sends it.
        files: the recordings of the entries that have neither audio nor codes, in this order.

    Raises:
        ContextError: an entry is invalid; the message begins with "context".
    """
    if isinstance(value, str):
        try:
            data = value.encode()
            check_items(data)
            value = parse_json(data, bounded_int)
        except UnicodeEncodeError:
            raise ContextError("context must be valid Unicode") from None
        except ValueError as error:
            raise ContextError(f"context cannot be read as JSON: {error}") from None
    if not isinstance(value, list):
        raise ContextError(f"context must be a list of segments, got {shown(type(value).__name__)}")
    if len(value) > MAX_SEGMENTS:
        raise ContextError(f"context has {len(value)} segments; at most {MAX_SEGMENTS} fit")
    found = []
    for i, entry in enumerate(_with_files(value, files)):
        fields = check_segment(entry, Place(f"context[{i}]: ", f"context[{i}]."))
        if fields.kind == "audio" and not (
            isinstance(fields.speech, str | bytes) and fields.speech
        ):
            raise ContextError(f"context[{i}].audio must be a recording in base64, or a file")
        if fields.kind == "codes" and not (isinstance(fields.speech, list) and fields.speech):
            raise ContextError(f"context[{i}].codes must be a list of frames, which are lists")
        found.append(fields)
    return found


def _with_files(entries: list[Any], files: Sequence[bytes]) -> list[Any]:
    """The entries of a context, with files as the audio of those that have no speech."""
    if not files:
        return entries
    is_silent = [isinstance(e, dict) and not {"audio", "codes"} & e.keys() for e in entries]
    if sum(is_silent) != len(files):
        raise ContextError(
            f"there are {len(files)} files audio, and context has {sum(is_silent)} segments "
            "without audio or codes"
        )
    left = iter(files)
    return [
        {**entry, "audio": next(left)} if silent else entry
        for entry, silent in zip(entries, is_silent, strict=True)
    ]


_SEGMENT_FIELDS = {
    "speaker": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "text": {"type": "string", "pattern": r"\S", "description": "what is spoken"},
}
_AUDIO = {
    "type": "string",
    "minLength": 1,
    "contentEncoding": "base64",
    "description": "WAV, FLAC, MP3 or OGG in base64, or a data: URL of it",
}
_CODES = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "array", "items": {"type": "integer", "minimum": 0}},
    "description": "frames of the codec, each with all codebooks",
}


def _segment_schema(kind: str, speech: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["speaker", "text", kind],
        "properties": {**_SEGMENT_FIELDS, kind: speech},
        "additionalProperties": False,
    }


SEGMENT_SCHEMA = {"oneOf": [_segment_schema("audio", _AUDIO), _segment_schema("codes", _CODES)]}
"""JSON schema of a segment."""

ContextField = Annotated[
    list[SegmentFields],
    PlainValidator(parse_context),
    WithJsonSchema({"type": "array", "items": SEGMENT_SCHEMA}),
]
"""The type of a request model's field `context`."""


def decode_context(
    segments: Sequence[SegmentFields],
    config: CsmConfig,
    codec: MimiConfig,
    limits: ContextLimits,
    pause: Callable[[], object] = lambda: None,
) -> list[Turn]:
    """Decode the recordings of a parsed context, and check codes and bounds.

    Args:
        segments: from `parse_context`.
        config: the model's sizes. The frames of all segments may fill its context.
        codec: the codec's sizes.
        limits: the bounds.
        pause: called before each segment. It may wait, or raise to give up.

    Raises:
        ContextTooLargeError: the recordings have more than `limits.max_bytes`.
        ContextError: a text is too long, a recording or codes are invalid, or there are more
            frames or seconds than the bounds allow. The message begins with "context[i]".
    """
    positions = config.backbone.max_positions
    if len(segments) > positions:
        raise ContextError(
            f"context has {len(segments)} segments, more than the model's context of {positions} "
            "positions"
        )
    context_s = positions * codec.frame_samples / codec.sample_rate_hz
    reader = _AudioReader(codec, limits.max_bytes, min(limits.max_s, context_s))
    turns: list[Turn] = []
    num_frames = 0
    for i, fields in enumerate(segments):
        place = f"context[{i}]"
        pause()
        try:
            check_length(fields.text, limits.max_text_chars)
        except ValueError as error:
            raise ContextError(f"{place}.{error}") from None
        try:
            if fields.kind == "audio":
                audio = reader.read(fields.speech)
                turns.append(Turn(fields.speaker, fields.text, audio=audio))
                num_frames += len(audio) // codec.frame_samples
            else:
                codes = _codes(fields.speech, config)
                turns.append(Turn(fields.speaker, fields.text, codes=codes))
                num_frames += len(codes)
        except AudioTooLargeError as error:
            raise ContextTooLargeError(f"{place}.audio: {error}") from None
        except ValueError as error:
            raise ContextError(f"{place}.{fields.kind}: {error}") from None
        if num_frames > positions:
            raise ContextError(
                f"{place}: the segments up to here have {num_frames} frames, more than the model's "
                f"context of {positions} positions"
            )
    return turns


def encode_context(turns: Sequence[Turn], encode: Callable[[np.ndarray], Tensor]) -> list[Segment]:
    """Encode a decoded context.

    Args:
        turns: from `decode_context`.
        encode: turns samples `[N]` into codes `[N, K]`; a ValueError if it cannot.

    Returns:
        Segments with codes `[N, K]` int64 each, on the CPU.

    Raises:
        ContextError: a recording cannot be encoded; the message says which and why.
    """
    segments = []
    for i, turn in enumerate(turns):
        codes = turn.codes
        if turn.audio is not None:
            try:
                codes = encode(turn.audio)
            except ValueError as error:
                raise ContextError(f"context[{i}].audio: {error}") from None
        segments.append(Segment(turn.speaker, turn.text, codes))
    return segments


class _AudioReader:
    """Reads recordings, encoded or in base64, until their bytes or seconds are used up.

    Seconds count as recorded, because silence is cheap to send, but not to decode.
    """

    def __init__(self, codec: MimiConfig, max_bytes: int, max_s: float) -> None:
        self._codec = codec
        self._bytes_left = max_bytes
        self._s_left = max_s
        self._max_s = max_s

    def read(self, speech: str | bytes) -> np.ndarray:
        codec = self._codec
        data = speech if isinstance(speech, bytes) else from_base64(speech, self._bytes_left)
        if len(data) > self._bytes_left:
            raise _too_large(len(data), self._bytes_left)
        self._bytes_left -= len(data)
        limits = Limits(
            max_s=self._s_left,
            max_bytes=len(data),
            rates_hz=RATES_HZ,
            max_channels=MAX_CHANNELS,
            common_only=True,
        )
        recording = decode(data, limits)
        self._s_left -= len(recording.samples) / recording.sample_rate_hz
        options = PromptOptions(max_s=self._max_s)
        return clean_prompt(recording, codec.sample_rate_hz, codec.frame_samples, options)


def from_base64(text: str, max_bytes: int) -> bytes:
    """The bytes of a base64 text, which may have line ends, or of a data: URL.

    Raises:
        AudioTooLargeError: it has more than `max_bytes`.
        ValueError: it is neither.
    """
    if text[:5].lower() == "data:":
        kind, comma, text = text.partition(",")
        if not comma or not kind.lower().endswith(";base64"):
            raise ValueError("a data: URL must be one of base64: data:audio/wav;base64,...")
    # A slice at a time: each holds Python's lock, which the engine's thread may want.
    starts = range(0, len(text), _BASE64_SLICE_CHARS)
    text = "".join("".join(text[i : i + _BASE64_SLICE_CHARS].split()) for i in starts)
    if (num_bytes := len(text) // 4 * 3) > max_bytes + 2:  # two bytes may be padding
        raise _too_large(num_bytes, max_bytes)
    if "=" in text[:-2]:
        raise ValueError("it is not base64")
    try:
        slices = range(0, len(text), _BASE64_SLICE_CHARS)
        data = b"".join(
            base64.b64decode(text[i : i + _BASE64_SLICE_CHARS], validate=True) for i in slices
        )
    except ValueError:
        raise ValueError("it is not base64") from None
    if len(data) > max_bytes:
        raise _too_large(len(data), max_bytes)
    return data


def _too_large(num_bytes: int, max_bytes: int) -> AudioTooLargeError:
    return AudioTooLargeError(f"the recording has {num_bytes} bytes; at most {max_bytes} fit")


def _codes(rows: list[Any], config: CsmConfig) -> Tensor:
    """Codes `[N, K]` int64 of a list of lists."""
    positions, v = config.backbone.max_positions, config.audio_vocab_size
    if len(rows) > positions:
        raise ValueError(
            f"there are {len(rows)} frames, the model's context has {positions} positions"
        )
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != config.num_codebooks:
            found = f"{len(row)}" if isinstance(row, list) else "no list"
            raise ValueError(
                f"frame {i} must be a list of {config.num_codebooks} codes, got {found}"
            )
        for code in row:
            if type(code) is not int or not 0 <= code < v:  # a bool is no code
                raise ValueError(
                    f"frame {i}: codes must be whole numbers from 0 to {v - 1}, got {shown(code)}"
                )
    return torch.tensor(rows, dtype=torch.int64)
