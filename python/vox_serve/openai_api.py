"""OpenAI's routes: /v1/audio/speech, /v1/models. Clients of OpenAI's API work unchanged."""

import asyncio
import time
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError

from vox_serve.config import Config
from vox_serve.formats import FormatError
from vox_serve.http_io import AsciiJSONResponse
from vox_serve.openai_errors import SPEECH_PATH
from vox_serve.provenance import public_name
from vox_serve.speech_docs import request_body, speech_responses
from vox_serve.speech_events import EVENTS_TYPE
from vox_serve.speech_service import SpeechService, Wish
from vox_serve.voice_store import VoiceStore

VOICES = {
    **dict.fromkeys(("alloy", "coral", "fable", "nova", "sage", "shimmer", "marin"), "0"),
    **dict.fromkeys(("ash", "ballad", "echo", "onyx", "verse", "cedar"), "1"),
}
"""OpenAI's voices, and the speakers that stand in for them."""

NAMES = {"text": "input", "format": "response_format"}
"""Fields of /generate that have other names here."""

IGNORED = ("model", "instructions")
"""Fields that must be text and change nothing."""

DEFAULT_FORMAT = "mp3"

OWN_ERROR = "invalid_field"
"""Type of the errors that `_wish` finds."""


def add_openai_routes(
    app: FastAPI, speech: SpeechService, store: VoiceStore, config: Config
) -> None:
    """Add the routes to an app.

    Args:
        app: the app.
        speech: answers the requests for speech.
        store: the voices that were added.
        config: the settings.
    """
    model = {
        "id": public_name(config.model),
        "object": "model",
        "created": int(time.time()),
        "owned_by": "voxkern",
    }

    @app.post(
        SPEECH_PATH,
        response_class=Response,
        responses=speech_responses(EVENTS_TYPE) | _SPEECH,
        openapi_extra=request_body(config, _openai_schema),
    )
    async def create_speech(request: Request) -> Response:
        """Speak a text, as OpenAI's API does. The audio is sent as it is made."""

        async def understand(given: dict[str, Any]) -> Wish:
            names = await asyncio.to_thread(store.names) if "voice" in given else ()
            return _wish(given, {*names})

        try:
            return await speech.answer(request, understand)
        except RequestValidationError as error:
            raise RequestValidationError([_renamed(item) for item in error.errors()]) from None
        except FormatError as error:
            raise FormatError(NAMES.get(error.param, error.param), str(error)) from None

    @app.get("/v1/models", responses=_REFUSED)
    async def list_models() -> Response:
        """The model that this server has."""
        return AsciiJSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/audio/models", responses=_REFUSED)
    async def list_speech_models() -> Response:
        """The same model, in the shape that Open WebUI reads."""
        name = {"id": model["id"], "name": model["id"]}
        return AsciiJSONResponse({"object": "list", "data": [model], "models": [name]})

    @app.get("/v1/models/{name}", responses=_UNKNOWN)
    async def get_model(name: str, request: Request) -> Response:
        """One model."""
        if name != model["id"]:
            request.state.param, request.state.code = "model", "model_not_found"
            raise HTTPException(404, f"there is no model {name[:100]!r}, only {model['id']}")
        return AsciiJSONResponse(model)

    @app.get("/v1/models/{key}/{name}", include_in_schema=False)
    async def get_hub_model(key: str, name: str, request: Request) -> Response:
        """One model whose id is a hub's."""
        return await get_model(f"{key}/{name}", request)


_REFUSED: dict[int | str, dict[str, Any]] = {
    401: {"description": "the API key is missing or wrong"},
    403: {"description": "a foreign origin or host"},
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {
    **_REFUSED,
    404: {"description": "there is no such model"},
}
_SPEECH: dict[int | str, dict[str, Any]] = {
    400: {"description": "the body cannot be read, or a field is invalid"},
}


def _wish(given: dict[str, Any], added_voices: set[str]) -> Wish:
    """The request in the server's own terms.

    Raises:
        RequestValidationError: a field that only this route has is invalid.
    """
    fields = dict(given)
    for name in NAMES:
        if name in fields:
            raise _invalid(name, "Extra inputs are not permitted")
    for name in IGNORED:
        if not isinstance(fields.pop(name, ""), str):
            raise _invalid(name, "Input should be a valid string")
    stream_format = fields.pop("stream_format", "audio")
    if stream_format not in ("audio", "sse"):
        raise _invalid("stream_format", "Input should be 'audio' or 'sse'")
    if "stream" in fields:
        if "streaming" in fields:
            raise _invalid("stream", "give it or streaming")
        fields["streaming"] = fields.pop("stream")
    for ours, name in NAMES.items():
        if name in fields:
            fields[ours] = fields.pop(name)
    voice = fields.get("voice")
    if isinstance(voice, dict):
        if list(voice) != ["id"]:
            raise _invalid("voice", "Input should be a name, or an object with an id")
        fields["voice"] = voice = voice["id"]
    if isinstance(voice, str) and voice not in added_voices:
        fields["voice"] = VOICES.get(voice, voice)
    return Wish(fields, DEFAULT_FORMAT, streaming=True, events=stream_format == "sse")


def _invalid(name: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": (name,), "msg": message, "type": OWN_ERROR}])


def _renamed(item: Any) -> Any:
    """An error of a field of /generate, as one of this route's."""
    if item["type"] == OWN_ERROR or not item["loc"]:
        return item
    first, *rest = item["loc"]
    return {**item, "loc": (NAMES.get(first, first), *rest)}


def _openai_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of /generate's fields, changed to this route's."""
    fields = dict(schema["properties"])
    fields["input"] = fields.pop("text")
    fields["response_format"] = {**fields.pop("format"), "default": DEFAULT_FORMAT}
    fields["streaming"] = {**fields["streaming"], "default": True}
    fields["stream"] = {"type": "boolean", "description": "the same as streaming"}
    text = {"type": "string"}
    voice_id = {
        "type": "object",
        "properties": {"id": {"type": "string", "minLength": 1}},
        "required": ["id"],
        "additionalProperties": False,
    }
    fields["voice"] = {
        "anyOf": [{"type": "string", "minLength": 1}, voice_id, {"type": "null"}],
        "description": "a voice's name, 0, 1, or one of OpenAI's: " + ", ".join(VOICES),
    }
    fields["model"] = {**text, "description": "any name: the server has one model"}
    fields["instructions"] = {**text, "description": "ignored: the model takes none"}
    fields["stream_format"] = {"enum": ["audio", "sse"], "default": "audio"}
    return {**schema, "title": "SpeechRequest", "properties": fields, "required": ["input"]}
