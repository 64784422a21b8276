"""The WebSocket /v1/audio/speech/stream: text in pieces in, speech out, many turns."""

import asyncio
import logging
from collections import Counter
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket
from starlette.types import Message

from vox_serve import engine
from vox_serve.access import LIVE_PROTOCOL, client_name
from vox_serve.config import Config
from vox_serve.connections import connection_limit
from vox_serve.conversation_service import ConversationService
from vox_serve.http_io import AsciiJSONResponse, BodyMemory
from vox_serve.job import Job
from vox_serve.live_connection import CLOSE_REPLACED, CLOSE_RESTART, LiveConnection
from vox_serve.provenance import HEADER, note_of
from vox_serve.runner import SHUTTING_DOWN, Runner
from vox_serve.voice_service import VoiceService

logger = logging.getLogger("vox_serve")

PATH = "/v1/audio/speech/stream"

MAX_TEXT_BYTES = 2**26
"""Memory for the texts of all turns."""


async def _never() -> Message:
    """A client's next message, for waits that a gone client ends by cancelling them."""
    await asyncio.Event().wait()
    raise AssertionError


class LiveService:
    """The server's part of all WebSockets. Only the event loop uses it.

    Args:
        runner: runs the engine.
        conversations, voices: of the server.
        config: the settings.

    Attributes:
        connections: those that are open.
        max_connections: the setting, or half of all connections that there may be.
        texts: bounds the texts of all turns that are not spoken to their end.
        note: goes into the audio's metadata; see provenance.py.
    """

    def __init__(
        self,
        runner: Runner,
        conversations: ConversationService,
        voices: VoiceService,
        config: Config,
    ) -> None:
        self.runner, self.config = runner, config
        self.conversations = conversations
        self._voices = voices
        self.connections: set[LiveConnection] = set()
        most = max(1, connection_limit(config.max_connections) // 2)
        self.max_connections = min(config.max_live_connections, most)
        self.texts = BodyMemory(MAX_TEXT_BYTES)
        self.note = note_of(config.model)
        runner.on_drain.append(self.drain)

    @property
    def part_chars(self) -> int:
        """Most characters of a sentence; a longer one is cut."""
        return self.runner.engine.part_chars

    @property
    def draining(self) -> bool:
        return self.runner.draining

    def drain(self) -> None:
        """Let each connection end when its turns are spoken."""
        for connection in self.connections:
            connection.close(CLOSE_RESTART, SHUTTING_DOWN)

    def has_room(self, client: str) -> bool:
        """True if a client may have one more connection; another one may end for it.

        That is the one which has been idle for longest of the client with the most, if that has
        at least two more than the newcomer.
        """
        if len(self.connections) < self.max_connections:
            return True
        counts = Counter(connection.client for connection in self.connections)
        largest, count = counts.most_common(1)[0]
        idle = [c for c in self.connections if c.client == largest and c.is_idle]
        if count < counts[client] + 2 or not idle:
            return False
        victim = min(idle, key=lambda connection: connection.quiet_since_s)
        self.connections.discard(victim)
        victim.close(CLOSE_REPLACED, "others wanted to connect")
        return True

    async def check_voice(self, client: str, key: str, session: Any) -> None:
        """Raise an error if a turn could not be spoken in a session's voice; see
        `VoiceService.request_in`."""
        async with self.conversations.held(client, session.conversation, waits=True):
            name = self.conversations.voice_of(client, key, session.voice)
        await self._voices.request_in(engine.Request("a"), name, session.speaker)

    async def speak(self, client: str, key: str, session: Any, request: engine.Request) -> Job:
        """Speak a turn's request in its conversation; see `ConversationService.speak`."""
        async with self.conversations.held(client, session.conversation, waits=True):
            name = self.conversations.voice_of(client, key, session.voice)
            request = await self._voices.request_in(request, name, session.speaker)
            conversation = self.conversations.open(client, key, name)
            return await self.conversations.speak(conversation, request, True, _never)


def add_live_routes(
    app: FastAPI,
    runner: Runner,
    conversations: ConversationService,
    voices: VoiceService,
    config: Config,
) -> None:
    """Add the WebSocket to an app."""
    service = LiveService(runner, conversations, voices, config)
    app.state.live = service

    @app.websocket(PATH)
    async def stream(socket: WebSocket) -> None:
        client = client_name(socket.scope)
        if runner.draining or not service.has_room(client):
            status_code = 503 if runner.draining else 429
            detail = SHUTTING_DOWN if runner.draining else "too many WebSockets are open: try later"
            headers = {"Retry-After": "1"}
            refusal = AsciiJSONResponse({"detail": detail}, status_code, headers)
            await socket.send_denial_response(refusal)
            return
        connection = LiveConnection(socket, service, client)
        service.connections.add(connection)
        try:
            offered = socket.scope.get("subprotocols", ())
            await socket.accept(
                LIVE_PROTOCOL if LIVE_PROTOCOL in offered else None,
                headers=[(HEADER.encode(), service.note.encode())],
            )
            await connection.run()
        finally:
            service.connections.discard(connection)

    @app.get(PATH, include_in_schema=False)
    async def explain(_: Request) -> Response:
        detail = "connect with a WebSocket: see docs/live.md"
        return AsciiJSONResponse({"detail": detail}, 426, headers={"Upgrade": "websocket"})
