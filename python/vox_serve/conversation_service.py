"""Speaks in conversations: one request after another, with the earlier turns as context."""

import asyncio
import logging
import math
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from typing import NamedTuple, Protocol

from starlette.types import Receive

from vox_serve.config import Config
from vox_serve.conversation_line import ConversationLine
from vox_serve.conversation_turns import TurnBuilder
from vox_serve.conversations import (
    Conversation,
    Conversations,
    ConversationsFullError,
    Turn,
    UnknownConversationError,
    Utterance,
    heard,
)
from vox_serve.ending import FRAME_S
from vox_serve.http_io import BodyMemory
from vox_serve.job import Job, QueueFull, RequestRefused
from vox_serve.prompt import Segment
from vox_serve.request import Request
from vox_serve.runner import Runner

logger = logging.getLogger("vox_serve")

WAITING_BYTES = 2**26
"""Most memory of all requests that wait in conversations."""

PLAYED_S = 5.0
"""Time after the end of an answer's speech in which it can still be interrupted."""

SWEEP_S = 60.0
"""Time between two looks for conversations that expire."""


class NothingSpokenError(RuntimeError):
    """Nothing can be interrupted."""


class Heard(NamedTuple):
    """The part of an answer that was heard before it was interrupted.

    Attributes:
        num_frames: frames that are kept.
        text: words that are kept.
    """

    num_frames: int
    text: str


class Home(Protocol):
    """A place beyond this process that knows the conversations of several (see cluster/home.py)."""

    def hold(self, client: str, key: str, waits: bool) -> AbstractAsyncContextManager[None]:
        """Bring a conversation here, if there is one, and keep it here within the block. If a
        request is in it elsewhere, wait for that, or raise an error that says where it is."""

    def changed(self, conversation: Conversation) -> None:
        """Note that a conversation has changed, or was begun or deleted."""


class ConversationService:
    """Answers requests in conversations. Only the event loop uses it.

    Args:
        runner: runs the engine.
        config: the settings.
        clock: the time in seconds.

    Attributes:
        kept: the conversations.
        home: of a cluster; None for a server that keeps them alone.
    """

    def __init__(
        self, runner: Runner, config: Config, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runner = runner
        self._engine = runner.engine
        self.home: Home | None = None
        self._builder = TurnBuilder(runner.engine)
        self._clock = clock
        self.kept = Conversations(
            config.max_conversations, config.conversation_idle_s, self._engine.max_positions, clock
        )
        self._lines: weakref.WeakKeyDictionary[Conversation, ConversationLine] = (
            weakref.WeakKeyDictionary()
        )
        self._waiting = BodyMemory(WAITING_BYTES)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to delete conversations that expire, even while there are no requests."""
        self.kept.expire()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(SWEEP_S, self.kept.idle_s), self.start)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def held(
        self, client: str, key: str | None, waits: bool = False
    ) -> AbstractAsyncContextManager[None]:
        """Have a client's conversation here within the block, if another server of a cluster has
        it. Each request that names one looks for it, and begins to use it, within such a block,
        which raises the home's errors.
        """
        if self.home is None or key is None:
            return nullcontext()
        return self.home.hold(client, key, waits)

    def create(self, client: str, key: str | None, voice: str | None) -> Conversation:
        """Begin a conversation; see `Conversations.create`.

        Raises:
            QueueFull: there is no room.
        """
        try:
            conversation = self.kept.create(client, key, voice)
        except ConversationsFullError as error:
            raise QueueFull(f"{error}: try later") from None
        self._changed(conversation)
        return conversation

    def remove(self, client: str, key: str) -> None:
        """Delete a client's conversation; see `Conversations.remove`."""
        conversation = self.kept.get(client, key)
        self.kept.remove(client, key)
        self._changed(conversation)

    def voice_of(self, client: str, key: str, voice: str | None) -> str | None:
        """The voice of a client's conversation, which begins with the given one if it is new.

        Raises:
            RequestRefused: it has another voice.
        """
        conversation = self.kept.find(client, key)
        if conversation is None:
            return voice
        if voice not in (None, conversation.voice):
            has = f"voice {conversation.voice}" if conversation.voice else "no voice"
            raise RequestRefused(f"voice is {voice[:100]}, but the conversation has {has}")
        return conversation.voice

    def open(self, client: str, key: str, voice: str | None) -> Conversation:
        """A client's conversation, which is begun if there is none.

        Raises:
            RequestRefused: the id is no id.
            QueueFull: there is no room.
        """
        try:
            return self.kept.find(client, key) or self.create(client, key, voice)
        except ValueError as error:
            raise RequestRefused(str(error)) from None

    def is_speaking(self, conversation: Conversation) -> bool:
        """True while an answer is being made."""
        return self._line(conversation).live_job is not None

    async def speak(
        self, conversation: Conversation, request: Request, streaming: bool, receive: Receive
    ) -> Job:
        """Speak a text as the next turn, when the requests before it in the conversation have
        been answered. What is spoken becomes a turn, unless the request fails.

        Args:
            conversation: it continues.
            request: its context, if it has any, is that of the voice.
            streaming: see `Job`.
            receive: of the HTTP request.

        Raises:
            QueueFull: too many requests wait in the conversation.
            HTTPException: 429, if those that wait in all conversations take too much memory.
            ClientGone: the client left before its turn came.
            UnknownConversationError: the conversation was deleted meanwhile.
            RequestRefused: the text cannot be tokenized.
            Unavailable: see `Runner.submit`.
        """
        line = await self._enter(conversation, receive, len(request.text))
        try:
            if self._engine.follows_context:
                room = await self._room(request)
                self._check(conversation)
                line.base, line.room = request.context, room
                request = self._builder.with_turns(request, conversation, room)
            job = self._runner.submit(request, conversation.client, streaming, keeps_frames=True)
        except BaseException:
            self._leave(conversation, line)
            raise
        conversation.end_reply()
        line.begin(job)
        job.on_end = partial(self._finish, conversation, line, job)
        return job

    @asynccontextmanager
    async def in_order(
        self, conversation: Conversation, receive: Receive, num_bytes: int
    ) -> AsyncIterator[None]:
        """Enter the block when the requests before have been answered.

        Args:
            conversation: it belongs to.
            receive: of the HTTP request.
            num_bytes: memory that the request takes while it waits.

        Raises:
            QueueFull, ClientGone, UnknownConversationError: see `speak`.
        """
        line = await self._enter(conversation, receive, num_bytes)
        try:
            yield
        finally:
            self._leave(conversation, line)

    async def add_turn(self, conversation: Conversation, segment: Segment) -> Turn:
        """Append a turn that the server did not speak. Call this within `in_order`.

        Raises:
            RequestRefused: its text cannot be tokenized.
            UnknownConversationError: the conversation was deleted meanwhile.
        """
        assert segment.codes is not None
        spoken = Utterance(segment.speaker, segment.text, segment.codes.numpy())
        try:
            turn = await asyncio.to_thread(self._builder.turn, spoken, generated=False)
        except ValueError as error:
            raise RequestRefused(str(error)) from None
        self._check(conversation)
        conversation.add(turn)
        self._changed(conversation)
        return turn

    def interrupt(self, conversation: Conversation, played_ms: float) -> Heard:
        """End the answer that is being spoken or played, and keep what was heard of it.

        Args:
            conversation: whose answer it is.
            played_ms: speech that was heard.

        Raises:
            NothingSpokenError: there is no such answer.
        """
        line = self._line(conversation)
        num_frames = math.ceil(round(played_ms / 1000 / FRAME_S, 6))
        if (job := line.live_job) is not None:
            line.heard_frames = num_frames
            job.interrupt()  # calls _finish
        elif conversation.reply_turns and self._clock() < conversation.reply_until_s:
            if (job := line.last_job) is not None:
                job.interrupt()
            spoken = [Utterance(t.speaker, t.text, t.codes) for t in conversation.reply]
            num_left = max(num_frames - conversation.reply_frames_forgotten, 0)
            turns = self._turns(heard(spoken, num_left, FRAME_S))
            conversation.shorten_reply(turns)
            self._changed(conversation)
            return _heard(turns)
        else:
            raise NothingSpokenError("nothing is being spoken in this conversation")
        turns = conversation.reply
        conversation.end_reply()
        self._changed(conversation)
        return _heard(turns)

    def _changed(self, conversation: Conversation) -> None:
        if self.home is not None:
            self.home.changed(conversation)
        if not conversation.is_deleted:
            self._prefill_next(conversation)

    def _prefill_next(self, conversation: Conversation) -> None:
        """Prefill the next request's context before it comes, as if it were like the last one."""
        line = self._line(conversation)
        if line.room is None:
            return
        line.next_turns = turns = conversation.context(line.room)
        if turns:
            self._runner.prefill_later(
                conversation.client,
                conversation.id,
                build=partial(self._builder.prompt, line.base, turns),
                is_wanted=lambda: line.next_turns is turns and not conversation.is_deleted,
            )

    def _line(self, conversation: Conversation) -> ConversationLine:
        if (line := self._lines.get(conversation)) is None:
            line = self._lines[conversation] = ConversationLine(self._waiting)
        return line

    async def _enter(
        self, conversation: Conversation, receive: Receive, num_bytes: int
    ) -> ConversationLine:
        """Wait until the requests before in the conversation have been answered."""
        line = self._line(conversation)
        conversation.num_users += 1
        try:
            await line.enter(conversation.client, receive, num_bytes)
        except BaseException:
            self._release(conversation)
            raise
        try:
            self._check(conversation)
        except BaseException:
            self._leave(conversation, line)
            raise
        return line

    def _leave(self, conversation: Conversation, line: ConversationLine) -> None:
        line.leave()
        self._release(conversation)

    def _release(self, conversation: Conversation) -> None:
        conversation.num_users -= 1
        self.kept.touch(conversation)

    def _check(self, conversation: Conversation) -> None:
        if conversation.is_deleted:
            raise UnknownConversationError(f"the conversation {conversation.id} was deleted")

    async def _room(self, request: Request) -> int:
        """Positions that turns may have beside a request."""
        try:
            return await asyncio.to_thread(self._builder.room, request)
        except ValueError as error:
            raise RequestRefused(str(error)) from None

    def _finish(self, conversation: Conversation, line: ConversationLine, job: Job) -> None:
        """Keep what a job spoke as turns, and let the next request begin."""
        try:
            if job.error is None and not conversation.is_deleted:
                turns = self._turns(self._spoken(job, line))
                seconds = sum(len(turn.codes) for turn in turns) * FRAME_S
                conversation.add_reply(turns, self._clock() + seconds + PLAYED_S)
                self._changed(conversation)
        except Exception:  # the client has its speech: a turn that is lost is the server's fault
            logger.exception("request %s cannot be kept as a turn", job.request.id)
        finally:
            job.frames.clear()
            self._leave(conversation, line)

    def _spoken(self, job: Job, line: ConversationLine) -> list[Utterance]:
        """The parts of a job's text that were spoken and, if it was interrupted, heard."""
        is_cut = job.finish_reason in (None, "interrupted")
        spoken = self._builder.spoken(
            job.request, job.progress.prompt, job.frames, is_cut, len(job.part_ends)
        )
        num_frames = len(job.frames) if line.heard_frames is None else line.heard_frames
        return heard(spoken, num_frames, FRAME_S)

    def _turns(self, spoken: Sequence[Utterance]) -> list[Turn]:
        return [self._builder.turn(utterance, generated=True) for utterance in spoken]


def _heard(turns: Sequence[Turn]) -> Heard:
    return Heard(sum(len(turn.codes) for turn in turns), " ".join(turn.text for turn in turns))
