"""The requests of one conversation: one is answered, the others wait for their turn."""

import asyncio
import weakref
from collections.abc import Sequence

from starlette.types import Receive

from vox_serve.conversations import Turn
from vox_serve.http_io import BodyMemory
from vox_serve.job import Job, QueueFull
from vox_serve.prompt import Segment
from vox_serve.speech_response import unless_gone

MAX_WAITING = 4
"""Requests that may wait for the one that a conversation answers."""


class ConversationLine:
    """A lock that is given in order of arrival. Only the event loop uses it.

    Args:
        waiting: bounds the memory of the requests that wait, in all conversations.

    Attributes:
        num_members: requests that hold the lock or wait for it.
        heard_frames: frames of the last job that were heard before it was interrupted.
        base: the context of the last request without turns, None for the default context.
        room: positions that turns had in it; None before the first request.
        next_turns: those that the next request's context will probably have.
    """

    def __init__(self, waiting: BodyMemory) -> None:
        self.num_members = 0
        self.heard_frames: int | None = None
        self.base: Sequence[Segment] | None = None
        self.room: int | None = None
        self.next_turns: Sequence[Turn] = ()
        self._waiting = waiting
        self._lock = asyncio.Lock()
        self._last: weakref.ref[Job] | None = None

    @property
    def last_job(self) -> Job | None:
        """The last one that began, while its reader has it."""
        return self._last() if self._last else None

    @property
    def live_job(self) -> Job | None:
        """The one that is being spoken or waits for a place."""
        job = self.last_job
        return job if job is not None and not (job.ended or job.closed) else None

    def begin(self, job: Job) -> None:
        """Note a job of the request that holds the lock."""
        self._last, self.heard_frames = weakref.ref(job), None

    async def enter(self, client: str, receive: Receive, num_bytes: int) -> None:
        """Wait for the lock.

        Args:
            client: whose request it is.
            receive: of the request.
            num_bytes: memory that it takes while it waits.

        Raises:
            QueueFull: too many wait.
            HTTPException: 429, if all that wait take too much memory, this client the most.
            ClientGone: the client left.
        """
        if self.num_members > MAX_WAITING:
            raise QueueFull(f"{MAX_WAITING} requests wait in this conversation: try later")
        self.num_members += 1
        is_locked = False

        async def lock() -> None:
            nonlocal is_locked
            await self._lock.acquire()
            is_locked = True

        try:
            with self._waiting.hold(client) as count:
                count(num_bytes)
                await unless_gone(receive, lock())
        except BaseException:
            self.num_members -= 1
            if is_locked:  # cancelled in the very turn in which it got the lock
                self._lock.release()
            raise

    def leave(self) -> None:
        """Give the lock to the next request."""
        self._lock.release()
        self.num_members -= 1
