"""The HTTP interface: routes, request model and error responses."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from vox_serve.access import AccessPolicy, add_access_checks
from vox_serve.config import Config, SpeechSettings
from vox_serve.connections import CloseUnread
from vox_serve.conversation_routes import add_conversation_routes
from vox_serve.conversation_service import ConversationService
from vox_serve.encoding_threads import load_codecs
from vox_serve.error_answers import add_error_handlers
from vox_serve.error_pace import PacedErrors
from vox_serve.formats import format_of_accept
from vox_serve.http_io import (
    MAX_BODY_MEMORY_BYTES,
    AsciiJSONResponse,
    BodyMemory,
    HeadAsGet,
    proxy_path,
)
from vox_serve.live import add_live_routes
from vox_serve.metrics import Source, add_metrics_route
from vox_serve.openai_api import add_openai_routes
from vox_serve.openai_errors import OpenAIErrors
from vox_serve.page import add_page
from vox_serve.request_id import RequestIds
from vox_serve.runner import Runner
from vox_serve.speech_docs import request_body, speech_responses
from vox_serve.speech_fields import GenerateRequest
from vox_serve.speech_service import SpeechService, Wish
from vox_serve.voice_routes import add_voice_routes
from vox_serve.voice_service import VoiceService

__all__ = ["GenerateRequest", "create_app"]


def create_app(runner: Runner, config: Config, description: Mapping[str, Any]) -> FastAPI:
    """Create the application, which starts the runner and stops it on shutdown.

    Args:
        runner: not started yet.
        config: defaults of requests, and limits; the model says how many speakers there are, if
            they do not.
        description: the engine's part of /health: model, device, dtype, ...

    Raises:
        ValueError: the folder of `config.voices` cannot be used.
    """

    config = config.for_speakers(runner.engine.prompts.config.num_speakers)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        runner.start()
        conversations.start()
        load_codecs()
        yield
        conversations.stop()
        voices.stop()
        await runner.stop()

    app = _App(
        title="VoxKern",
        description="Text to speech with CSM.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere; page/ has one of our own
        redoc_url=None,
    )
    app.proxy_path = proxy_path(config.root_path)
    bodies = BodyMemory(max(MAX_BODY_MEMORY_BYTES, config.max_body_bytes))
    voices = VoiceService(runner, config)
    add_voice_routes(app, voices, runner, config)
    conversations = ConversationService(runner, config)
    app.state.voices, app.state.conversations = voices, conversations
    add_conversation_routes(app, conversations, voices, bodies, config)
    speech = SpeechService(runner, config, voices, conversations, bodies)
    add_openai_routes(app, speech, voices.store, config)
    add_live_routes(app, runner, conversations, voices, config)

    @app.post(
        "/generate",
        response_class=Response,
        responses=speech_responses(),
        openapi_extra=request_body(config),
    )
    async def generate(request: Request) -> Response:
        """Speak a text. Send JSON, or a form with the same fields."""
        accepted = format_of_accept(request.headers.get("accept", ""))

        async def understand(given: dict[str, Any]) -> Wish:
            return Wish(given, accepted or "wav", is_plain=accepted in (None, "wav"))

        return await speech.answer(request, understand)

    defaults = config.model_dump(include=set(SpeechSettings.model_fields))

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
            "defaults": defaults,
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
    add_page(app)

    add_error_handlers(app)
    app.add_middleware(HeadAsGet)
    add_access_checks(app, AccessPolicy.of(config))
    app.add_middleware(CloseUnread)
    app.add_middleware(OpenAIErrors)
    app.add_middleware(PacedErrors)
    return app


class _App(FastAPI):
    """An application whose every answer has an id and is counted, those to bugs too.

    Attributes:
        proxy_path: see `--root_path`; "" for none.
    """

    proxy_path = ""

    def __init__(self, **options: Any) -> None:
        self.statuses: dict[int, int] = {}
        super().__init__(**options)

    def build_middleware_stack(self) -> ASGIApp:
        return RequestIds(super().build_middleware_stack(), self.statuses)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.proxy_path and scope["type"] in ("http", "websocket"):
            scope["root_path"] = self.proxy_path
        await super().__call__(scope, receive, send)
