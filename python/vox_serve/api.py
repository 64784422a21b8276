"""The HTTP interface: routes, request model and error responses."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic.fields import FieldInfo
from starlette.types import ASGIApp

from vox_serve import engine
from vox_serve.access import AccessPolicy, add_access_checks, client_name
from vox_serve.config import MAX_FRAMES, Config, SpeechSettings
from vox_serve.connections import CloseUnread
from vox_serve.context_field import ContextField, ContextTooLargeError, parse_context
from vox_serve.context_segment import ContextError
from vox_serve.conversation_routes import add_conversation_routes
from vox_serve.conversation_service import ConversationService
from vox_serve.conversations import ID_PATTERN
from vox_serve.error_pace import PacedErrors
from vox_serve.http_io import (
    MAX_BODY_MEMORY_BYTES,
    AsciiJSONResponse,
    BodyMemory,
    HeadAsGet,
    read_fields,
)
from vox_serve.job import QueueFull, RequestFailed, RequestRefused, Unavailable
from vox_serve.metrics import Source, add_metrics_route
from vox_serve.request_id import RequestIds
from vox_serve.runner import Runner
from vox_serve.speech_response import (
    CLIENT_CLOSED_REQUEST,
    ClientGone,
    speech_response,
    unless_gone,
)
from vox_serve.text_bound import check_length
from vox_serve.voice_routes import add_voice_routes
from vox_serve.voice_service import VoiceService

MAX_SHOWN_ERRORS = 20

LONG_CONTEXT_CHARS = 2**18
LONG_CONTEXT_SEGMENTS = 64
"""Longer contexts are checked in another thread."""


class _Utterance(BaseModel):
    """A text to say. Fields that are not given take the server's defaults."""

    # Without `forbid` a misspelt field would be ignored silently.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    text: str = Field(
        description="text to say, not blank", min_length=1, json_schema_extra={"pattern": r"\S"}
    )
    speaker: int = Field(default=0, description="id of the speaker", ge=0, le=1)
    voice: str | None = Field(
        default=None, description="name of a voice, instead of a speaker", min_length=1
    )
    context: ContextField | None = Field(
        default=None, description="earlier turns with their speech, before this text"
    )
    conversation: str | None = Field(
        default=None,
        description="id of the conversation that this text continues",
        json_schema_extra={"pattern": f"^{ID_PATTERN}$"},
    )
    streaming: bool = Field(default=False, description="send the audio as it is made")

    @field_validator("text")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("must not be blank")
        return text

    def to_engine(self, config: Config) -> engine.Request:
        """Convert to the engine's request; `config` has the defaults.

        Raises:
            RequestRefused: `max_frames` is above the server's limit.
        """
        overrides = self.model_dump(exclude=set(_Utterance.model_fields))
        limit = config.frames_limit
        if (overrides["max_frames"] or 0) > limit:
            raise RequestRefused(
                f"max_frames must be at most {limit} on this server, got {overrides['max_frames']}"
            )
        overrides["max_frames"] = overrides["max_frames"] or min(
            config.frames_for(self.text), config.max_frames_limit or MAX_FRAMES
        )
        speech = config.override(**overrides)
        return engine.Request(
            text=self.text,
            speaker=self.speaker,
            sampling=speech.sampling,
            max_frames=speech.max_frames,
            normalise=speech.normalise,
        )


def _override(field: FieldInfo) -> Any:
    """A request's field that overrides a setting, with the setting's bounds."""
    kind: Any = field.annotation
    if field.metadata:
        kind = Annotated[kind, *field.metadata]
    return kind | None, Field(default=None, description=field.description)


GenerateRequest = create_model(
    "GenerateRequest",
    __base__=_Utterance,
    __doc__=_Utterance.__doc__,
    **{name: _override(field) for name, field in SpeechSettings.model_fields.items()},
)


def _form_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a form with the fields of a JSON schema: it has no null."""

    def without_null(field: Mapping[str, Any]) -> dict[str, Any]:
        kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
        rest = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
        return {**rest, **kinds[0]} if kinds else dict(field)

    fields = {name: without_null(field) for name, field in schema["properties"].items()}
    fields["context"] = {"type": "string", "contentMediaType": "application/json"}
    return {**schema, "properties": fields}


def _generate_docs(config: Config) -> dict[str, Any]:
    """The documentation of /generate's body, with this server's limits."""
    schema = GenerateRequest.model_json_schema()
    schema["properties"]["max_frames"]["anyOf"][0]["maximum"] = config.frames_limit
    form = _form_schema(schema)
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    multipart = {**form, "properties": {**form["properties"], "audio": files}}
    content = {
        "application/json": {"schema": schema},
        "application/x-www-form-urlencoded": {"schema": form},
        "multipart/form-data": {"schema": multipart},
    }
    return {"requestBody": {"required": True, "content": content}}


_GENERATE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "24 kHz mono 16-bit WAV", "content": {"audio/wav": {}}},
    400: {"description": "the body cannot be read"},
    401: {"description": "the API key is missing or wrong"},
    403: {
        "description": "the request comes from a web page of another origin, or names another host"
    },
    404: {"description": "there is no such voice, or the conversation was deleted meanwhile"},
    413: {"description": "the body or the context is too long"},
    415: {"description": "the body is neither JSON nor a form"},
    422: {"description": "a field is invalid, or the text too long for the model's context"},
    429: {"description": "too many requests wait; Retry-After says when to try again"},
    500: {"description": "the request failed"},
    503: {"description": "the engine stopped, or the server is shutting down"},
}


def create_app(runner: Runner, config: Config, description: Mapping[str, Any]) -> FastAPI:
    """Create the application, which starts the runner and stops it on shutdown.

    Args:
        runner: not started yet.
        config: defaults of requests, and limits.
        description: the engine's part of /health: model, device, dtype, ...

    Raises:
        ValueError: the folder of `config.voices` cannot be used.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        runner.start()
        conversations.start()
        yield
        conversations.stop()
        voices.stop()
        await runner.stop()

    app = _App(title="VoxKern", description="Text to speech with CSM.", lifespan=lifespan)
    bodies = BodyMemory(max(MAX_BODY_MEMORY_BYTES, config.max_body_bytes))
    voices = VoiceService(runner, config)
    add_voice_routes(app, voices, runner, config)
    conversations = ConversationService(runner, config)
    app.state.voices, app.state.conversations = voices, conversations
    add_conversation_routes(app, conversations, voices, bodies, config)

    @app.post(
        "/generate",
        response_class=Response,
        responses=_GENERATE_RESPONSES,
        openapi_extra=_generate_docs(config),
    )
    async def generate(request: Request) -> Response:
        """Speak a text. Send JSON, or a form with the same fields."""
        client = client_name(request.scope)
        with ExitStack() as stack:  # holds the memory of a long body
            upload = voices.large_body(request, stack, client, "context", "audio", file="audio")
            with bodies.hold(client) as count:
                given, is_form = await read_fields(request, config.max_body_bytes, count, upload)
            if _is_long(given.get("context")):
                wanted = await asyncio.to_thread(validated, given, is_form)
            else:
                wanted = validated(given, is_form)
            context = wanted.context
            if context:
                try:
                    reading = voices.read_context(context, client)
                    context = await unless_gone(request.receive, reading)
                except ClientGone:
                    return Response(status_code=CLIENT_CLOSED_REQUEST)
        key, name = wanted.conversation, wanted.voice
        if key is not None:
            name = conversations.voice_of(client, key, name)
        speaker = wanted.speaker if "speaker" in wanted.model_fields_set else None
        spoken = await voices.request_in(wanted.to_engine(config), name, speaker)
        if context is not None:
            spoken = replace(spoken, context=[*(spoken.context or ()), *context])
        if key is None:
            job = runner.submit(spoken, client, wanted.streaming)
        else:
            try:
                job = await conversations.speak(
                    conversations.open(client, key, name),
                    spoken,
                    wanted.streaming,
                    request.receive,
                )
            except ClientGone:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
        return await speech_response(job, wanted.streaming, request.receive)

    def validated(given: dict[str, Any], is_form: bool) -> Any:
        if isinstance(text := given.get("text"), str):
            try:
                check_length(text, config.max_text_chars)
            except ValueError as error:
                raise RequestRefused(str(error)) from None
        validate = (
            GenerateRequest.model_validate_strings if is_form else GenerateRequest.model_validate
        )
        update = {}
        if is_form and isinstance(files := given.get("audio"), list):
            given = {name: value for name, value in given.items() if name != "audio"}
            update["context"] = parse_context(given.pop("context", "[]"), files)
        try:
            wanted = validate(given).model_copy(update=update)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None
        if wanted.context is not None and wanted.conversation is not None:
            raise RequestRefused("give either context or conversation: that has its own context")
        return wanted

    @app.get("/health", responses={503: {"description": "the engine cannot serve"}})
    async def health() -> Response:
        """200 when the engine can serve, 503 with the reason when it cannot."""
        live, waiting = runner.count_jobs()
        status, reason = runner.status
        state = {
            "status": status,
            **({"reason": reason} if reason else {}),
            **description,
            "live_requests": live,
            "waiting_requests": waiting,
            "unread_bytes": runner.unread_bytes,
            "max_queue_size": config.max_queue_size,
            "counts": runner.totals(),
            "cache": runner.engine.cache_counts(),
            "step_ms": runner.engine.times.summary(),
        }
        return AsciiJSONResponse(state, 503 if reason else 200)

    @app.get("/health/live")
    async def live() -> Response:
        """200 while the process lives."""
        return AsciiJSONResponse({"status": "live"})

    @app.get("/health/ready", responses={503: {"description": "send no requests here"}})
    async def ready() -> Response:
        """200 when new requests are served, 503 with the reason when they are not."""
        status, reason = runner.status
        if reason is None:
            return AsciiJSONResponse({"status": "ready"})
        return AsciiJSONResponse({"status": status, "reason": reason}, 503)

    add_metrics_route(app, Source(runner, description, app.statuses))

    _add_error_handlers(app)
    app.add_middleware(HeadAsGet)
    add_access_checks(app, AccessPolicy.of(config))
    app.add_middleware(CloseUnread)
    app.add_middleware(PacedErrors)
    return app


class _App(FastAPI):
    """An application whose every answer has an id and is counted, those to bugs too."""

    def __init__(self, **options: Any) -> None:
        self.statuses: dict[int, int] = {}
        super().__init__(**options)

    def build_middleware_stack(self) -> ASGIApp:
        return RequestIds(super().build_middleware_stack(), self.statuses)


def _is_long(context: Any) -> bool:
    """True if a context, which may be JSON text, takes long to check."""
    if isinstance(context, str):
        return len(context) > LONG_CONTEXT_CHARS
    return isinstance(context, list) and len(context) > LONG_CONTEXT_SEGMENTS


def _add_error_handlers(app: FastAPI) -> None:
    """Make every error response `{"detail": ...}`."""

    @app.exception_handler(RequestValidationError)
    async def wrong_field(_: Request, error: RequestValidationError) -> Response:
        # Leave out pydantic's `input` and `ctx`: they may hold megabytes, or values JSON cannot.
        detail = [
            {
                "loc": ["body", *(str(part)[:100] for part in item["loc"])],
                "msg": item["msg"],
                "type": item["type"],
            }
            for item in error.errors()[:MAX_SHOWN_ERRORS]
        ]
        return AsciiJSONResponse({"detail": detail}, 422)

    @app.exception_handler(RequestRefused)
    async def refused(_: Request, error: RequestRefused) -> Response:
        return AsciiJSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(ContextError)
    async def wrong_context(_: Request, error: ContextError) -> Response:
        status_code = 413 if isinstance(error, ContextTooLargeError) else 422
        return AsciiJSONResponse({"detail": str(error)}, status_code)

    @app.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Unavailable) -> Response:
        status_code = 429 if isinstance(error, QueueFull) else 503
        headers = {"Retry-After": str(error.retry_after_s)}
        return AsciiJSONResponse({"detail": str(error)}, status_code, headers)

    @app.exception_handler(RequestFailed)
    async def failed(_: Request, error: RequestFailed) -> Response:
        return AsciiJSONResponse({"detail": str(error)}, 500)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return AsciiJSONResponse({"detail": "internal error"}, 500)
