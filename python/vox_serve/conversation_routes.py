"""The HTTP routes of conversations: begin, add a turn, show, interrupt, delete."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vox_serve import engine
from vox_serve.access import client_name
from vox_serve.config import Config
from vox_serve.context_field import SEGMENT_SCHEMA, parse_context
from vox_serve.context_segment import ContextError, speech_bytes
from vox_serve.conversation_service import ConversationService, NothingSpokenError
from vox_serve.conversations import (
    ID_PATTERN,
    Conversation,
    ConversationExistsError,
    Turn,
    UnknownConversationError,
)
from vox_serve.ending import FRAME_S
from vox_serve.error_answers import shortened
from vox_serve.http_io import (
    AsciiJSONResponse,
    BodyMemory,
    Upload,
    media_type,
    read_fields,
    read_parts,
)
from vox_serve.speech_response import CLIENT_CLOSED_REQUEST, ClientGone, unless_gone
from vox_serve.voice_service import VoiceService

OBJECT = "conversation"
MAX_PLAYED_MS = 10**10


class _New(BaseModel):
    """A conversation to begin."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | None = Field(default=None, pattern=f"^{ID_PATTERN}$")
    voice: str | None = Field(default=None, min_length=1)


class _Interruption(BaseModel):
    """An interruption of an answer."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    played_ms: float = Field(ge=0, le=MAX_PLAYED_MS)


def _body(schema: dict[str, Any], required: bool = True) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": required, "content": content}}


_TURN_FORM = {
    "type": "object",
    "properties": {
        "speaker": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "text": {"type": "string", "pattern": r"\S"},
        "audio": {"type": "string", "format": "binary"},
    },
    "required": ["speaker", "text", "audio"],
    "additionalProperties": False,
}
_TURN_DOCS = _body(SEGMENT_SCHEMA)
_TURN_DOCS["requestBody"]["content"]["multipart/form-data"] = {"schema": _TURN_FORM}
_REFUSED: dict[int | str, dict[str, Any]] = {
    401: {"description": "the API key is missing or wrong"},
    403: {"description": "a foreign origin or host"},
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {
    **_REFUSED,
    404: {"description": "this client has no such conversation"},
}
_BODY: dict[int | str, dict[str, Any]] = {
    **_REFUSED,
    400: {"description": "the body cannot be read"},
    404: {"description": "there is no such voice, or this client has no such conversation"},
    409: {"description": "the id is taken, or nothing is being spoken"},
    413: {"description": "the body is too long"},
    415: {"description": "the body is not JSON"},
    422: {"description": "a field or a recording is invalid"},
    429: {"description": "too many requests wait, or too many conversations are in use"},
    503: {"description": "the server is shutting down"},
}


def add_conversation_routes(
    app: FastAPI,
    conversations: ConversationService,
    voices: VoiceService,
    bodies: BodyMemory,
    config: Config,
) -> None:
    """Add the routes below /v1/conversations to an app, and the errors of conversations."""
    path = "/v1/conversations"

    async def read(request: Request, upload: Upload | None = None) -> dict[str, Any]:
        """The fields of a JSON body."""
        with bodies.hold(client_name(request.scope)) as count:
            given, is_form = await read_fields(request, config.max_body_bytes, count, upload)
        if is_form:
            raise HTTPException(415, "send JSON")
        return given

    @app.post(
        path,
        status_code=201,
        responses=_BODY,
        openapi_extra=_body(_New.model_json_schema(), required=False),
    )
    async def begin(request: Request) -> Response:
        """Begin a conversation. A request to /generate with a new id does so too."""
        headers = request.headers
        is_empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        fields = _checked(_New, {} if is_empty else await read(request))
        if fields.voice is not None:  # it must exist
            await voices.request_in(engine.Request("a"), fields.voice)
        client = client_name(request.scope)
        async with conversations.held(client, fields.id):
            conversation = conversations.create(client, fields.id, fields.voice)
        return AsciiJSONResponse(_described(conversation), 201)

    @app.post(
        f"{path}/{{key}}/turns",
        status_code=201,
        responses=_BODY,
        openapi_extra=_TURN_DOCS,
    )
    async def add_turn(key: str, request: Request) -> Response:
        """Add a turn that somebody else spoke. A new id begins a conversation."""
        client = client_name(request.scope)
        with ExitStack() as stack, _named_alone():
            kind = media_type(request)
            if kind == "multipart/form-data":
                count = stack.enter_context(voices.hold_context(client))
                parts = await read_parts(request, config.max_upload_bytes, 1, count)
                given = _form_turn(parts)
            else:
                upload = voices.large_body(request, stack, client, "audio", "codes")
                given = await read(request, upload)
            fields = parse_context([given])
            num_bytes = speech_bytes(fields)
            try:
                async with conversations.held(client, key):
                    conversation = conversations.open(client, key, None)
                    async with conversations.in_order(conversation, request.receive, num_bytes):
                        reading = voices.read_context(fields, client)
                        (segment,) = await unless_gone(request.receive, reading)
                        turn = await conversations.add_turn(conversation, segment)
            except ClientGone:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
        return AsciiJSONResponse(_turn(turn), 201)

    @app.get(f"{path}/{{key}}", responses=_UNKNOWN)
    async def show(key: str, request: Request) -> Response:
        """A conversation's turns; with `?codes=1` also the codes of their frames."""
        client = client_name(request.scope)
        async with conversations.held(client, key):
            conversation = conversations.kept.get(client, key)
        with_codes = request.query_params.get("codes", "0") in ("1", "true")
        shown = _described(conversation) | {
            "speaking": conversations.is_speaking(conversation),
            "forgotten_turns": conversation.num_forgotten,
            "turns": [_turn(turn, with_codes) for turn in conversation.turns],
        }
        return AsciiJSONResponse(shown)

    @app.post(
        f"{path}/{{key}}/interrupt",
        responses=_BODY,
        openapi_extra=_body(_Interruption.model_json_schema()),
    )
    async def interrupt(key: str, request: Request) -> Response:
        """End the answer that is being spoken, and keep what was heard of it."""
        fields = _checked(_Interruption, await read(request))
        client = client_name(request.scope)
        async with conversations.held(client, key):
            conversation = conversations.kept.get(client, key)
            heard = conversations.interrupt(conversation, fields.played_ms)
        return AsciiJSONResponse(
            {
                "id": conversation.id,
                "object": f"{OBJECT}.interrupted",
                "heard_s": round(heard.num_frames * FRAME_S, 3),
                "text": heard.text,
            }
        )

    @app.delete(f"{path}/{{key}}", responses=_UNKNOWN)
    async def delete(key: str, request: Request) -> Response:
        """Delete a conversation. Speech in it goes on."""
        client = client_name(request.scope)
        async with conversations.held(client, key):
            conversations.remove(client, key)
        return AsciiJSONResponse({"id": key, "object": f"{OBJECT}.deleted", "deleted": True})

    for kind, status_code in (
        (UnknownConversationError, 404),
        (ConversationExistsError, 409),
        (NothingSpokenError, 409),
    ):
        app.add_exception_handler(kind, _handler(status_code))


def _handler(status_code: int) -> Any:
    async def handle(_: Request, error: Exception) -> Response:
        return AsciiJSONResponse({"detail": shortened(error)}, status_code)

    return handle


def _form_turn(parts: Sequence[tuple[str, str | bytes]]) -> dict[str, Any]:
    """The fields of a turn from a form, as JSON has them."""
    given: dict[str, Any] = dict(parts)
    if len(given) < len(parts):
        raise HTTPException(422, "the form gives a field more than once")
    if isinstance(speaker := given.get("speaker"), str) and speaker.isdecimal():
        given["speaker"] = int(speaker[:11])  # more digits are too many anyway
    return given


@contextmanager
def _named_alone() -> Iterator[None]:
    """Let the errors of a context of one turn name the fields as the turn has them."""
    try:
        yield
    except ContextError as error:
        raise type(error)(str(error).removeprefix("context[0]").lstrip(".: ")) from None


def _checked(model: Any, given: dict[str, Any]) -> Any:
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from None


def _described(conversation: Conversation) -> dict[str, Any]:
    return {"id": conversation.id, "object": OBJECT, "voice": conversation.voice}


def _turn(turn: Turn, with_codes: bool = False) -> dict[str, Any]:
    return {
        "speaker": turn.speaker,
        "text": turn.text,
        "seconds": round(len(turn.codes) * FRAME_S, 3),
        "generated": turn.generated,
        **({"codes": turn.codes.tolist()} if with_codes else {}),
    }
