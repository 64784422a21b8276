"""The HTTP routes of voices: add, list, describe, listen to, delete."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vox_serve import engine
from vox_serve.access import client_name
from vox_serve.audio import wav_file
from vox_serve.config import Config
from vox_serve.context_field import from_base64
from vox_serve.error_answers import shortened
from vox_serve.formats import WAV
from vox_serve.http_io import (
    MAX_JSON_BYTES,
    AsciiJSONResponse,
    media_type,
    read_json,
    read_parts,
)
from vox_serve.provenance import note_of
from vox_serve.runner import Runner
from vox_serve.sampling import SamplingParams
from vox_serve.speech_response import (
    CLIENT_CLOSED_REQUEST,
    ClientGone,
    Delivery,
    speech_response,
    unless_gone,
)
from vox_serve.text_bound import check_length
from vox_serve.voice_file import MAX_RECORDINGS, NAME_PATTERN, Voice, VoiceError
from vox_serve.voice_maker import Excerpt, VoiceMaker
from vox_serve.voice_service import VoiceService
from vox_serve.voice_store import (
    StoreBusyError,
    StoreFullError,
    UnknownVoiceError,
    VoiceExistsError,
    is_speaker,
    speaker_names,
)

SAMPLE_TEXT = "Hello. This is how I speak when I read a text to you."
"""The text of a built-in voice's sample."""

OBJECT = "audio.voice"


class _Recording(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    audio: bytes = Field(min_length=1)
    transcript: str = Field(min_length=1)

    @field_validator("transcript")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("must not be blank")
        return text


class VoiceUpload(BaseModel):
    """A voice to add."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    speaker: int = Field(default=0, ge=0, lt=2**31)
    replace: bool = False
    recordings: list[_Recording] = Field(min_length=1, max_length=MAX_RECORDINGS)


def _schema(audio: dict[str, Any], repeated: bool) -> dict[str, Any]:
    """The schema of a voice's upload: as JSON, or as a form whose fields may be repeated."""
    recording = {
        "audio": audio,
        "transcript": {
            "type": "string",
            "minLength": 1,
            "pattern": r"\S",
            "description": "what the recording says, word by word",
        },
    }
    required = list(recording)
    fields: dict[str, Any] = {
        "name": {"type": "string", "pattern": f"^{NAME_PATTERN}$"},
        "speaker": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1, "default": 0},
        "replace": {
            "type": "boolean",
            "default": False,
            "description": "replace the voice of this name if there is one",
        },
    }
    bounds = {"type": "array", "minItems": 1, "maxItems": MAX_RECORDINGS}
    if repeated:
        fields |= {name: {**bounds, "items": item} for name, item in recording.items()}
        required = ["name", *required]
    else:
        item = {"type": "object", "properties": recording, "required": required}
        fields["recordings"] = {**bounds, "items": {**item, "additionalProperties": False}}
        required = ["name", "recordings"]
    return {
        "type": "object",
        "properties": fields,
        "required": required,
        "additionalProperties": False,
    }


_ADD_DOCS = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": _schema({"type": "string", "format": "byte"}, repeated=False)
            },
            "multipart/form-data": {
                "schema": _schema({"type": "string", "format": "binary"}, repeated=True)
            },
        },
    }
}
_REFUSED: dict[int | str, dict[str, Any]] = {
    401: {"description": "the API key is missing or wrong"},
    403: {"description": "a foreign origin or host, or the voice is built in"},
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {
    **_REFUSED,
    404: {"description": "there is no such voice"},
    422: {"description": "the voice was made for another model, or its file is broken"},
}
_DELETE: dict[int | str, dict[str, Any]] = {
    **_UNKNOWN,
    503: {"description": "another process changes the folder of voices"},
    507: {"description": "the voice cannot be deleted"},
}
_SAMPLE: dict[int | str, dict[str, Any]] = {
    **_UNKNOWN,
    200: {"description": "mono 16-bit WAV", "content": {"audio/wav": {}}},
    429: {"description": "too many requests wait; Retry-After says when to try again"},
    500: {"description": "the request failed"},
    503: {"description": "the engine stopped, or the server is shutting down"},
}
_ADD: dict[int | str, dict[str, Any]] = {
    **_REFUSED,
    400: {"description": "the body cannot be read"},
    409: {"description": "there is a voice of this name, or as many as may be"},
    413: {"description": "the body is too long"},
    415: {"description": "the body is neither JSON nor multipart/form-data"},
    422: {"description": "a field or a recording is invalid, or the recordings are too long"},
    429: {"description": "too many uploads at once; Retry-After says when to try again"},
    503: {"description": "the server is shutting down, or another process changes the folder"},
    507: {"description": "the voice cannot be written"},
}


def add_voice_routes(app: FastAPI, voices: VoiceService, runner: Runner, config: Config) -> None:
    """Add the routes below /v1/audio/voices to an app, and the errors of voices."""
    store = voices.store

    @app.post("/v1/audio/voices", status_code=201, responses=_ADD, openapi_extra=_ADD_DOCS)
    async def add_voice(request: Request) -> Response:
        """Add a voice: its name, and recordings with their transcripts."""
        client = client_name(request.scope)
        with voices.upload(client) as count:
            upload = await read_upload(request, config, count)
            try:
                making = voices.make(
                    upload.name,
                    upload.speaker,
                    partial(read_excerpts, upload.recordings, voices.maker),
                    client,
                    upload.replace,
                )
                voice = await unless_gone(request.receive, making)
            except ClientGone:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            except OSError as error:
                detail = f"the voice cannot be written: {error.strerror}"
                raise HTTPException(507, detail) from None
        return AsciiJSONResponse(_described(voice), 201)

    @app.get("/v1/audio/voices", responses=_REFUSED)
    async def list_voices() -> Response:
        """All voices, the model's own speakers first. Open WebUI reads their names in `voices`."""
        found = [_built_in(name) for name in speaker_names(config.speaker_limit)]
        found += [_described(voice) for voice in await asyncio.to_thread(store.voices)]
        names = [{"id": voice["id"], "name": voice["id"]} for voice in found]
        return AsciiJSONResponse({"object": "list", "data": found, "voices": names})

    @app.get("/v1/audio/voices/{name}", responses=_UNKNOWN)
    async def get_voice(name: str) -> Response:
        """One voice."""
        if is_speaker(name, config.speaker_limit):
            return AsciiJSONResponse(_built_in(name))
        return AsciiJSONResponse(_described(await asyncio.to_thread(store.get, name)))

    @app.get("/v1/audio/voices/{name}/sample", response_class=Response, responses=_SAMPLE)
    async def get_sample(name: str, request: Request) -> Response:
        """The beginning of a voice's recordings as the codec decodes them; of a built-in voice a
        sentence that it says."""
        if not is_speaker(name, config.speaker_limit):
            voice = await asyncio.to_thread(store.get, name)
            wav = wav_file(voice.preview.tobytes(), voice.sample_rate_hz)
            return Response(wav, media_type="audio/wav")
        spoken = engine.Request(
            SAMPLE_TEXT,
            int(name),
            sampling=SamplingParams(seed=0),
            max_frames=min(config.frames_for(SAMPLE_TEXT), config.frames_limit),
        )
        job = runner.submit(spoken, client_name(request.scope), streaming=False)
        output = replace(WAV, watermark=config.watermark)
        delivery = Delivery(False, output, note_of(config.model), is_plain=True)
        return await speech_response(job, delivery, request.receive)

    @app.delete("/v1/audio/voices/{name}", responses=_DELETE)
    async def delete_voice(name: str) -> Response:
        """Delete a voice. Speech in it goes on."""
        if is_speaker(name, config.speaker_limit):
            raise HTTPException(403, f"voice {name} is built in")
        try:
            await voices.remove(name)
        except OSError as error:
            raise HTTPException(507, f"the voice cannot be deleted: {error.strerror}") from None
        return AsciiJSONResponse({"id": name, "object": f"{OBJECT}.deleted", "deleted": True})

    for kind, status_code in (
        (VoiceError, 422),
        (UnknownVoiceError, 404),
        (VoiceExistsError, 409),
        (StoreFullError, 409),
        (StoreBusyError, 503),
    ):
        app.add_exception_handler(kind, _handler(status_code))


def _handler(status_code: int) -> Any:
    headers = {"Retry-After": "1"} if status_code == 503 else None

    async def handle(_: Request, error: Exception) -> Response:
        return AsciiJSONResponse({"detail": shortened(error)}, status_code, headers)

    return handle


async def read_upload(
    request: Request, config: Config, count: Callable[[int], None] = lambda num_bytes: None
) -> VoiceUpload:
    """Read the body of a request that adds a voice.

    Args:
        request: the request.
        config: the settings.
        count: see `BodyMemory.hold`.

    Raises:
        HTTPException, RequestValidationError, VoiceError: the body or a field is invalid.
    """
    kind = media_type(request)
    if kind == "multipart/form-data":
        parts = await read_parts(request, config.max_upload_bytes, MAX_RECORDINGS, count)
        fields = _form_fields(parts)
    else:
        max_bytes = min(config.max_upload_bytes, MAX_JSON_BYTES)
        fields = await read_json(request, max_bytes, count)
        await asyncio.to_thread(_decode_audio, fields, config.max_upload_bytes)
    try:
        upload = VoiceUpload.model_validate(fields, strict=kind != "multipart/form-data")
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from None
    for i, recording in enumerate(upload.recordings):
        try:
            check_length(recording.transcript, config.max_text_chars)
        except ValueError as error:
            raise VoiceError(f"recordings.{i}.transcript: {error}") from None
    return upload


def _form_fields(parts: Sequence[tuple[str, str | bytes]]) -> dict[str, Any]:
    """The fields of an upload: `audio` and `transcript` may be repeated, in the same order."""
    lists: dict[str, list[Any]] = {}
    for name, value in parts:
        lists.setdefault(name, []).append(value)
    recordings = lists.pop("audio", []), lists.pop("transcript", [])
    if len(recordings[0]) != len(recordings[1]):
        raise HTTPException(
            422, f"the form has {len(recordings[0])} audio and {len(recordings[1])} transcript"
        )
    if twice := [name for name, values in lists.items() if len(values) > 1]:
        raise HTTPException(422, f"the form gives {twice[0][:100]!r} more than once")
    fields = {name: values[0] for name, values in lists.items() if values[0] != ""}
    pairs = zip(*recordings, strict=True)
    return fields | {"recordings": [{"audio": a, "transcript": t} for a, t in pairs]}


def _decode_audio(fields: dict[str, Any], max_bytes: int) -> None:
    """Replace the base64 of each recording, or the data: URL of it, by its bytes."""
    recordings = fields.get("recordings")
    for i, recording in enumerate(recordings if isinstance(recordings, list) else ()):
        if isinstance(recording, dict) and isinstance(text := recording.get("audio"), str):
            try:
                recording["audio"] = from_base64(text, max_bytes)
            except ValueError as error:
                raise VoiceError(f"recordings.{i}.audio: {error}") from None


def read_excerpts(
    recordings: Sequence[_Recording],
    maker: VoiceMaker,
    pause: Callable[[], object] = lambda: None,
) -> list[Excerpt]:
    """Decode and clean the recordings of an upload; call `pause` before each of them.

    Raises:
        VoiceError: one is invalid; the message begins with its field.
    """
    excerpts = []
    for i, (audio, transcript) in enumerate((r.audio, r.transcript) for r in recordings):
        pause()
        try:
            excerpts.append(maker.excerpt(audio, transcript))
        except ValueError as error:
            raise VoiceError(f"recordings.{i}.audio: {error}") from None
    return excerpts


def _described(voice: Voice) -> dict[str, Any]:
    return {
        "id": voice.name,
        "object": OBJECT,
        "name": voice.name,
        "speaker": voice.speaker,
        "built_in": False,
        "created_at": voice.created,
        "duration_s": round(sum(map(voice.seconds, voice.segments)), 3),
        "recordings": [
            {"transcript": s.text, "duration_s": voice.seconds(s), "level_dbfs": level}
            for s, level in zip(voice.segments, voice.levels_dbfs, strict=True)
        ],
    }


def _built_in(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": OBJECT,
        "name": name,
        "speaker": int(name),
        "built_in": True,
        "created_at": None,
        "duration_s": None,
        "recordings": [],
    }
