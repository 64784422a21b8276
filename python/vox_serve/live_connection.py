"""One WebSocket: reads messages and speaks turns, one after another."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, WebSocket
from starlette.types import Message
from starlette.websockets import WebSocketDisconnect

from vox_serve.conversation_service import Heard, NothingSpokenError
from vox_serve.conversations import UnknownConversationError
from vox_serve.ending import FRAME_S
from vox_serve.growing_text import GrowingText
from vox_serve.job import RequestFailed, RequestRefused, ShuttingDown, Unavailable
from vox_serve.live_messages import (
    MessageError,
    Session,
    checked,
    merged,
    output_of,
    parse,
    to_request,
)
from vox_serve.live_sender import LiveSender
from vox_serve.live_turn import Turn
from vox_serve.runner import SHUTTING_DOWN
from vox_serve.voice_file import VoiceError

if TYPE_CHECKING:
    from vox_serve.live import LiveService

logger = logging.getLogger("vox_serve")

MAX_WAITING_TURNS = 4
"""Turns that may wait for the one that is being spoken."""

MAX_WAITS = 3
"""A turn keeps its place without text for so many times `--live_text_timeout_s`, in all."""

MAX_ERRORS = 100
"""Messages of a connection that may be refused without a turn that is spoken in between."""

CLOSE_REFUSED = 1008
CLOSE_FAILED = 1011
CLOSE_RESTART = 1012
CLOSE_REPLACED = 1013
CLOSE_IDLE = 4408


class LiveConnection:
    """Speaks the turns of one client over one socket.

    Args:
        socket: accepted already.
        service: the server's part.
        client: whose connection it is.

    Attributes:
        quiet_since_s: time of the last message or the end of the last turn, by the loop's clock.
    """

    def __init__(self, socket: WebSocket, service: "LiveService", client: str) -> None:
        self.client = client
        self._socket = socket
        self._sender = LiveSender(socket, service.note)
        self._service = service
        self._config = service.config
        self._loop = asyncio.get_running_loop()
        self._given: dict[str, Any] = {}
        self._session: Any = Session()
        self._output = output_of(self._session, self._config.watermark)
        self._own_key = f"live-{uuid.uuid4().hex}"
        self._is_ready = False
        self._turns: deque[Turn] = deque()  # the first one is being spoken
        self._open: Turn | None = None  # the one that is being written
        self._last: Turn | None = None  # the last one that was spoken
        self._num_turns = 0
        self._num_errors = 0
        self._news = asyncio.Event()
        self._speaking: asyncio.Task[None] | None = None
        self._closing: tuple[int, str] | None = None
        self.quiet_since_s = self._text_at_s = self._loop.time()

    @property
    def is_idle(self) -> bool:
        """True if no turn is being written or spoken."""
        return not self._turns

    def close(self, code: int, reason: str) -> None:
        """Close the connection once the turns that have begun are spoken; begin no more."""
        self._closing = self._closing or (code, reason)
        self._news.set()

    async def run(self) -> None:
        """Serve the connection until its end."""
        reading = asyncio.ensure_future(self._read())
        speaking = asyncio.ensure_future(self._speak_turns())
        tasks = (reading, speaking)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            code, reason = self._ending(tasks)
            if code:
                with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                    await self._socket.close(code, reason)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for turn in self._turns:
                turn.forget()
            with contextlib.suppress(UnknownConversationError):
                self._service.conversations.remove(self.client, self._own_key)

    def _ending(self, tasks: "tuple[asyncio.Task[None], ...]") -> tuple[int, str]:
        """The close code and reason; the code is 0 if the client is gone."""
        for task in tasks:
            if not task.done() or (error := task.exception()) is None:
                continue
            if isinstance(error, WebSocketDisconnect):
                return 0, ""
            logger.error("a WebSocket failed", exc_info=error)
            return CLOSE_FAILED, "internal error"
        return self._closing or (1000, "")

    # Reading.

    async def _read(self) -> None:
        """Handle messages; return only to close the connection at once."""
        while True:
            try:
                async with asyncio.timeout(self._patience_s()):
                    message = await self._socket.receive()
            except TimeoutError:
                if self._gave_up():
                    return
                continue
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            if not await self._take(message):
                return
            await asyncio.sleep(0)  # many messages may have come at once

    def _patience_s(self) -> float:
        """Time to wait for a message before something has to be done."""
        now = self._loop.time()
        idle_s = self._config.live_idle_s
        if self._open is not None and not self._open.is_over:
            return max(0.0, self._text_at_s + self._config.live_text_timeout_s - now)
        return max(0.0, self.quiet_since_s + idle_s - now) if self.is_idle else idle_s

    def _gave_up(self) -> bool:
        """End a turn without text, or the connection: True."""
        now = self._loop.time()
        if (turn := self._open) is not None and not turn.is_over:
            if now - self._text_at_s >= self._config.live_text_timeout_s:
                self._end_waiting(turn)
        elif self.is_idle and now - self.quiet_since_s >= self._config.live_idle_s:
            self.close(CLOSE_IDLE, "nothing was sent for too long")
            return True
        return False

    def _end_waiting(self, turn: Turn) -> None:
        """Take a turn's text for complete: it has waited for too long."""
        turn.timed_out = True
        self._end_text()

    def _count_wait(self) -> None:
        """Count the time for which the open turn keeps its place without text, up to a limit."""
        if (turn := self._open) is not None:
            turn.count_wait(time.monotonic())
            if turn.waited_s > MAX_WAITS * self._config.live_text_timeout_s:
                self._end_waiting(turn)

    async def _take(self, message: Message) -> bool:
        """Handle a message; False if the connection has to be closed now."""
        self._count_wait()
        self.quiet_since_s = self._loop.time()
        try:
            text = message.get("text")
            if text is None:
                raise MessageError("send text messages: binary ones have no meaning")
            kind, fields = parse(text)
            if kind == "session" or not self._is_ready:
                await self._set_session(fields if kind == "session" else {})
            if kind == "text":
                await self._write(fields["text"])
            elif kind == "flush":
                self._flush()
            elif kind == "end":
                self._open_turn()
                self._end_text()
            elif kind == "cancel":
                await self._cancel(fields.get("played_ms"))
            elif kind == "close":
                self._end_text()
                self.close(1000, "")
        except MessageError as error:
            self._num_errors += 1
            await self._sender.error(error, self._open)
            if self._num_errors >= MAX_ERRORS:
                self.close(CLOSE_REFUSED, "too many messages were refused")
                return False
        return True

    async def _set_session(self, fields: dict[str, Any]) -> None:
        given = merged(self._given, fields, self._config)
        session = checked(Session, given)
        output = output_of(session, self._config.watermark)
        try:
            await self._service.check_voice(self.client, self._key(session), session)
        except (ValueError, VoiceError) as error:
            raise MessageError(str(error), "voice") from None
        except Unavailable as error:
            raise _refusal(error) from None
        self._given, self._session, self._output = given, session, output
        self._is_ready = True
        await self._sender.event(
            "ready",
            conversation=self._key(session),
            format=session.format,
            sample_rate=output.rate_hz,
            channels=1,
        )

    def _key(self, session: Any) -> str:
        return str(session.conversation or self._own_key)

    def _open_turn(self) -> Turn:
        """The turn that is being written; a new one if there is none."""
        if self._open is None:
            if self._closing is not None or self._service.draining:
                raise MessageError(SHUTTING_DOWN if self._service.draining else "it is closing")
            if len(self._turns) > MAX_WAITING_TURNS:
                raise MessageError(f"{MAX_WAITING_TURNS} turns wait: try later", "text", 1)
            self._num_turns += 1
            max_chars = self._service.part_chars
            preferred = min(self._session.part_chars, max_chars)
            text = GrowingText(self._config.max_text_chars, max_chars, preferred)
            memory = self._service.texts.hold(self.client)
            self._open = Turn(self._num_turns, self._session, self._output, text, memory)
            self._turns.append(self._open)
            self._text_at_s = self._loop.time()
            self._news.set()
        return self._open

    async def _write(self, fragment: str) -> None:
        turn = self._open_turn()
        if turn.is_over or not fragment:
            return
        try:
            await turn.write(fragment)
        except ValueError as error:
            raise MessageError(str(error), "text") from None
        except HTTPException:
            raise MessageError("too much text waits to be spoken: try later", "text", 1) from None
        self._text_at_s = self._loop.time()
        self._service.runner.resume()

    def _flush(self) -> None:
        if self._open is not None and not self._open.is_over:
            self._open.flush()
            self._service.runner.resume()

    def _end_text(self) -> None:
        if self._open is not None:
            turn, self._open = self._open, None
            if not turn.is_over:
                turn.end()
                self._service.runner.resume()

    async def _cancel(self, played_ms: float | None) -> None:
        """End all turns, and keep of the one that is played what was heard."""
        turns, self._open = [turn for turn in self._turns if not turn.is_over], None
        current = turns[0] if turns and turns[0].job is not None else None
        played = current or self._last
        if played is not None and played_ms is None:
            played_ms = played.num_frames * FRAME_S * 1000
        heard = None
        if played is not None:
            conversation = self._service.conversations.kept.find(
                self.client, self._key(played.session)
            )
            with contextlib.suppress(NothingSpokenError):
                if conversation is not None:
                    heard = self._service.conversations.interrupt(conversation, played_ms or 0.0)
        if not turns and heard is None:
            raise MessageError("nothing is being spoken", "type")
        for turn in turns:
            turn.is_over = True
            turn.heard = heard if turn is current and heard is not None else Heard(0, "")
        if current is not None and current.job is not None:
            current.job.interrupt()  # no audio is left to send
        elif turns and turns[0] is self._turns[0] and self._speaking is not None:
            self._speaking.cancel()
        # Last: meanwhile a turn that waits might begin.
        if played is not current and played is not None and heard is not None:
            await self._sender.cancelled(played, heard)

    # Speaking.

    async def _speak_turns(self) -> None:
        """Speak one turn after another; return when the connection must be closed."""
        while True:
            while not self._turns:
                if self._closing is not None:
                    return
                self._news.clear()
                await self._news.wait()
            turn = self._turns[0]
            if not turn.is_over:
                self._speaking = asyncio.ensure_future(self._speak(turn))
                try:
                    await asyncio.wait((self._speaking,))
                finally:
                    self._speaking.cancel()
                    await asyncio.gather(self._speaking, return_exceptions=True)
                if not self._speaking.cancelled() and (error := self._speaking.exception()):
                    raise error
                self._speaking = None
            if turn.heard is not None:
                await self._sender.cancelled(turn, turn.heard)
            turn.is_over = True
            turn.forget()
            self._turns.popleft()
            self.quiet_since_s = self._loop.time()

    async def _speak(self, turn: Turn) -> None:
        await turn.begun()
        reason: str | None = "stop"
        if turn.feed is not None:
            try:
                reason = await self._speak_parts(turn)
            except WebSocketDisconnect:
                raise
            except Exception as error:
                reason = "error"
                if turn.heard is None:
                    await self._sender.error(_refusal(error), turn)
            else:
                self._num_errors = 0
        if turn.heard is None:
            turn.is_over = True
            extra = {"timed_out": True} if turn.timed_out else {}
            await self._sender.event(
                "turn.done",
                turn=turn.number,
                finish_reason=reason,
                samples=turn.num_samples,
                **extra,
            )

    async def _speak_parts(self, turn: Turn) -> str | None:
        """Speak a turn; return its finish reason."""
        assert turn.feed is not None
        self._last = turn
        request = to_request(turn.session, turn.feed, self._config)
        key = self._key(turn.session)
        turn.job = await self._service.speak(self.client, key, turn.session, request)
        with turn.job as job:
            await self._sender.audio(turn, job)
            ending = job.request.id, job.finish_reason, job.num_frames
            logger.info("request %s ended: %s, %d frames", *ending)
            if job.error is not None:
                raise job.error
            return job.finish_reason


def _refusal(error: Exception) -> MessageError:
    """The error that a client gets for an exception, which is logged if it is a bug."""
    if isinstance(error, Unavailable):
        return MessageError(str(error), None, error.retry_after_s)
    if isinstance(error, HTTPException):
        return MessageError(str(error.detail), None, 1)
    if isinstance(error, VoiceError):
        return MessageError(str(error), "voice")
    known = (RequestRefused, RequestFailed, ShuttingDown, UnknownConversationError)
    if isinstance(error, known):
        return MessageError(str(error))
    logger.error("a turn failed", exc_info=error)
    return MessageError("internal error")
