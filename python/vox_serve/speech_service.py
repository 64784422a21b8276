"""Answers requests for speech, whatever the shape in which a route takes them."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from vox_serve.access import client_name
from vox_serve.config import Config
from vox_serve.context_field import parse_context
from vox_serve.conversation_service import ConversationService
from vox_serve.http_io import BodyMemory, read_fields
from vox_serve.job import RequestRefused
from vox_serve.provenance import note_of
from vox_serve.runner import Runner
from vox_serve.speech_fields import request_model
from vox_serve.speech_response import (
    CLIENT_CLOSED_REQUEST,
    ClientGone,
    Delivery,
    speech_response,
    unless_gone,
)
from vox_serve.text_bound import check_length
from vox_serve.voice_service import VoiceService

LONG_CONTEXT_CHARS = 2**18
LONG_CONTEXT_SEGMENTS = 64
"""Longer contexts are checked in another thread."""


@dataclass(frozen=True)
class Wish:
    """A request's fields in the shape of `GenerateRequest`, and what these do not have.

    Attributes:
        fields: they are not checked yet.
        format: the audio format, unless `fields` has one.
        streaming: whether the audio is sent as it is made, unless `fields` says it.
        is_plain: a WAV has nothing but its header and samples.
        events: the audio comes as server-sent events.
    """

    fields: dict[str, Any]
    format: str = "wav"
    streaming: bool = False
    is_plain: bool = False
    events: bool = False


class SpeechService:
    """Reads requests for speech and answers them.

    Args:
        runner: runs the engine.
        config: the settings.
        voices, conversations: the server's.
        bodies: counts the bodies that are being read.
    """

    def __init__(
        self,
        runner: Runner,
        config: Config,
        voices: VoiceService,
        conversations: ConversationService,
        bodies: BodyMemory,
    ) -> None:
        self._runner, self._config = runner, config
        self._voices, self._conversations = voices, conversations
        self._bodies = bodies
        self._note = note_of(config.model)

    async def answer(
        self, request: Request, understand: Callable[[dict[str, Any]], Awaitable[Wish]]
    ) -> Response:
        """Speak what a request asks.

        Args:
            request: its body is JSON, or a form.
            understand: converts the fields of the body, given as JSON values or as text.

        Raises:
            HTTPException, RequestValidationError, RequestRefused, FormatError, ContextError,
            VoiceError, Unavailable, RequestFailed: the request gets an error.
        """
        config, voices = self._config, self._voices
        client = client_name(request.scope)
        with ExitStack() as stack:  # holds the memory of a long body
            upload = voices.large_body(request, stack, client, "context", "audio", file="audio")
            with self._bodies.hold(client) as count:
                given, is_form = await read_fields(request, config.max_body_bytes, count, upload)
            wish = await understand(given)
            if _is_long(given.get("context")):
                wanted = await asyncio.to_thread(self._validated, wish.fields, is_form)
            else:
                wanted = self._validated(wish.fields, is_form)
            is_given = "streaming" in wanted.model_fields_set
            streaming = wanted.streaming if is_given else wish.streaming
            delivery = Delivery(
                streaming or wish.events,
                wanted.output(wish.format, config.watermark),
                self._note,
                is_plain=wish.is_plain and wanted.format is None,
                events=wish.events,
            )
            context = wanted.context
            if context:
                try:
                    reading = voices.read_context(context, client)
                    context = await unless_gone(request.receive, reading)
                except ClientGone:
                    return Response(status_code=CLIENT_CLOSED_REQUEST)
        key, name = wanted.conversation, wanted.voice
        speaker = wanted.speaker if "speaker" in wanted.model_fields_set else None
        async with self._conversations.held(client, key):
            if key is not None:
                name = self._conversations.voice_of(client, key, name)
            spoken = await voices.request_in(wanted.to_engine(config), name, speaker)
            if context is not None:
                spoken = replace(spoken, context=[*(spoken.context or ()), *context])
            if key is None:
                job = self._runner.submit(spoken, client, delivery.streaming)
            else:
                try:
                    job = await self._conversations.speak(
                        self._conversations.open(client, key, name),
                        spoken,
                        delivery.streaming,
                        request.receive,
                    )
                except ClientGone:
                    return Response(status_code=CLIENT_CLOSED_REQUEST)
        return await speech_response(job, delivery, request.receive)

    def _validated(self, given: Mapping[str, Any], is_form: bool) -> Any:
        """The checked fields: a `GenerateRequest`."""
        if isinstance(text := given.get("text"), str):
            try:
                check_length(text, self._config.max_text_chars)
            except ValueError as error:
                raise RequestRefused(str(error)) from None
        model = request_model(self._config.speaker_limit)
        validate = model.model_validate_strings if is_form else model.model_validate
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


def _is_long(context: Any) -> bool:
    """True if a context, which may be JSON text, takes long to check."""
    if isinstance(context, str):
        return len(context) > LONG_CONTEXT_CHARS
    return isinstance(context, list) and len(context) > LONG_CONTEXT_SEGMENTS
