"""A request on its way through the runner, as its reader sees it."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from vox_serve.deadlines import FRAME_S
from vox_serve.measures import Playback
from vox_serve.request_id import current_id

if TYPE_CHECKING:
    from vox_serve.request import FinishReason, Prompt, Request


class RequestRefused(ValueError):  # noqa: N818
    """The engine rejects this request; the message says why."""


class RequestFailed(RuntimeError):  # noqa: N818
    """This request fails, and others go on; the message is for its client."""


class ReaderStalled(RequestFailed):
    """The job's reader took no audio for too long, or left too much of it unread."""


@dataclass
class Unavailable(RuntimeError):  # noqa: N818
    """The server takes no request now, but may later.

    Attributes:
        reason: why.
        retry_after_s: the time after which a new attempt is sensible, in whole seconds.
    """

    reason: str
    retry_after_s: int = 1

    def __str__(self) -> str:
        return self.reason


class QueueFull(Unavailable):
    """As many requests, or as much audio, wait as may wait."""


class EngineFailure(Unavailable):
    """The engine can no longer serve."""


class ShuttingDown(EngineFailure):
    """The server is about to end, and begins no request any more."""


class Owner(Protocol):
    """A job's runner, as the job sees it."""

    stall_timeout_s: float

    def close(self, job: "Job") -> None: ...
    def resume(self) -> None: ...
    def waited(self, job: "Job") -> None: ...
    def stalled(self, job: "Job") -> None: ...
    def count_unread(self, job: "Job", num_bytes: int) -> None: ...
    def spoke_first(self, job: "Job") -> None: ...


@dataclass(frozen=True)
class End:
    """The end of a job.

    Attributes:
        finish_reason: why the speech ends.
        error: raised to the reader after the audio that came before.
    """

    finish_reason: "FinishReason | None" = None
    error: Exception | None = None


class Restart:
    """The audio so far is void; the utterance begins again."""


class SpokenFrame(NamedTuple):
    """A frame whose audio comes next.

    Attributes:
        part: index of the part of a long text (see `LongForm`).
        codes: `[K]` int32.
    """

    part: int
    codes: np.ndarray


class PartEnd(NamedTuple):
    """The end of a part of a text that is still being written.

    Attributes:
        part: its index.
        finish_reason: why it ends.
        num_frames: frames of the job until here; set when it arrives.
    """

    part: int
    finish_reason: "FinishReason"
    num_frames: int = 0


Item = bytes | SpokenFrame | PartEnd | End | Restart


@dataclass
class Progress:
    """A job as the engine's thread sees it.

    Attributes:
        prompt: set before the job becomes ready.
        num_frames: frames since the last start.
        started_s: time of the first start, by the monotonic clock.
        num_failures: failed steps in which it took part.
        num_failures_alone: those in which it was the only one.
    """

    prompt: "Prompt | None" = None
    num_frames: int = 0
    started_s: float | None = None
    num_failures: int = 0
    num_failures_alone: int = 0


MAX_AHEAD_BYTES = 2_880_000
"""Audio that a stream's reader may leave unread before no more is made: 60 s. Most utterances are
shorter: their places are free when they are spoken, even if nobody reads."""
RESUME_BYTES = MAX_AHEAD_BYTES // 2


class Job:
    """Async iterator over one request's PCM chunks, one per frame; use it inside `with`.

    Leaving the `with` block before the end aborts the request. All methods except `post` belong to
    the event loop that made the job.

    Args:
        request: the request to run.
        client: whose request it is.
        streaming: chunks are read as they are made. Otherwise they are read after `finished`, and
            a failed step can start the utterance again.
        owner: the runner.
        keeps_frames: keep the codes of the frames that arrive.

    Attributes:
        finish_reason: set when the job ends.
        error: set when the job fails.
        frames: those that arrived, if they are kept.
        part_ends: ends of parts that arrived, if the text is still being written.
        interrupted: `interrupt` ended the audio.
        on_end: called once, when the job ends or is closed.
        unread_bytes: audio that the reader has not taken.
        is_ahead: so much of it that no more needs to be made now.
        is_encoding: a whole answer that the client cannot take yet, although it has ended.
        request_id: of the HTTP request that is served, for the log; "" without one.
        submitted_s: time when the job was made, by the event loop's clock.
        listener: plays the frames as they are made; None for a whole answer, and for a text that
            is still being written.

    Raises:
        RequestRefused: on the first chunk, when the engine rejects the request.
        RequestFailed: on any chunk, when this request failed.
        Unavailable: on any chunk, when the server could not run or finish the request.
    """

    def __init__(
        self,
        request: "Request",
        client: str,
        streaming: bool,
        owner: Owner,
        keeps_frames: bool = False,
    ):
        self.request = request
        self.client = client
        self.streaming = streaming
        self.num_frames = 0
        self.unread_bytes = 0
        self.is_ahead = False
        self.is_encoding = False
        self.ended = False
        self.closed = False
        self.interrupted = False
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.keeps_frames = keeps_frames
        self.frames: list[SpokenFrame] = []
        self.part_ends: list[PartEnd] = []
        self.on_end: Callable[[], None] = lambda: None
        self.progress = Progress()
        self._owner = owner
        self._chunks: deque[bytes] = deque()
        self._loop = asyncio.get_running_loop()
        self.request_id = current_id()
        self.submitted_s = self._loop.time()
        self.listener = None
        if streaming and request.feed is None:
            self.listener = Playback(frame_s=FRAME_S / request.speed)
        self._changed = asyncio.Event()
        self._last_taken_s = 0.0
        self._stall_timer: asyncio.TimerHandle | None = None
        self._place_timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks and not self.ended:
            await self._wait()
        if self._chunks:
            return self._take()
        if self.error is not None:
            raise self.error
        raise StopAsyncIteration

    async def changed(self) -> None:
        """Wait until something has arrived since the last call: a chunk, an end of a part, or the
        end of the job."""
        await self._changed.wait()
        self._changed.clear()

    def take_nowait(self) -> bytes | None:
        """The next chunk; None if none has arrived."""
        return self._take() if self._chunks else None

    async def finished(self) -> int:
        """Wait for the end; return the number of bytes that `async for` then yields.

        Raises:
            See `Job`.
        """
        while not self.ended:
            await self._wait()
        if self.error is not None:
            raise self.error
        return self.unread_bytes

    def put_back(self, pieces: Sequence[bytes]) -> int:
        """Replace the audio of a whole answer, all of which was read, by audio in another form.

        Returns:
            The number of bytes that `async for` then yields.

        Raises:
            QueueFull: it is too much audio to keep.
        """
        self._chunks.extend(pieces)
        self._count(sum(map(len, pieces)))
        if self.error is not None:
            raise self.error
        self._watch_reader()
        return self.unread_bytes

    @property
    def is_starved(self) -> bool:
        """True if all text that has come is spoken, and more may come."""
        feed = self.request.feed
        return feed is not None and feed.is_starved

    def close(self) -> None:
        """Give the job up; abort it unless it ended. Idempotent."""
        self.closed = True
        self.discard()
        self._owner.close(self)
        self._notify()

    def interrupt(self) -> None:
        """End the job now, without an error, and forget its unread audio: what was read is all.

        A whole answer that is complete stays as it is, since its length may have been sent.
        """
        if self.ended and not self.streaming:
            return
        self.interrupted = True
        self.discard()
        self._end(End("interrupted"))
        self._changed.set()
        self._owner.close(self)

    def post(self, *items: Item) -> None:
        """Queue chunks; an `End` ends the job. Callable from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._receive, items)
        except RuntimeError:  # the loop is closed: the reader is gone
            self.on_end = lambda: None
            self.close()

    def drop(self, error: Exception) -> None:
        """End the job now: forget its unread audio, and raise `error` to the reader."""
        self.discard()
        self._end(End(error=error))
        self._changed.set()
        self.close()

    def discard(self) -> None:
        """Forget the unread audio."""
        self._chunks.clear()
        self._count(-self.unread_bytes)
        for timer in (self._stall_timer, self._place_timer):
            if timer is not None:
                timer.cancel()
        self._stall_timer = self._place_timer = None

    def wait_for_place(self, seconds: float) -> None:
        """Tell the owner if the job still waits for its place after so long."""
        self._place_timer = self._loop.call_later(seconds, self._owner.waited, self)

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _take(self) -> bytes:
        self._last_taken_s = self._loop.time()
        chunk = self._chunks.popleft()
        self._count(-len(chunk))
        return chunk

    def _count(self, num_bytes: int) -> None:
        self.unread_bytes += num_bytes
        if self.streaming and self.unread_bytes > MAX_AHEAD_BYTES:
            self.is_ahead = True
        elif self.is_ahead and self.unread_bytes < RESUME_BYTES:
            self.is_ahead = False
            self._owner.resume()
        self._owner.count_unread(self, num_bytes)

    def _receive(self, items: Sequence[Item]) -> None:
        for item in items:
            if self.ended or self.closed:
                break
            if isinstance(item, bytes):
                self.num_frames += 1
                if self.num_frames == 1:
                    self._owner.spoke_first(self)
                self._chunks.append(item)
                self._count(len(item))
            elif isinstance(item, SpokenFrame):
                self.frames.append(item)
            elif isinstance(item, PartEnd):
                self.part_ends.append(item._replace(num_frames=self.num_frames))
            elif isinstance(item, Restart):
                self.num_frames = 0
                self.frames.clear()
                self.part_ends.clear()
                self.discard()
            else:
                self._end(item)
        self._changed.set()
        if self.streaming or self.ended:
            self._watch_reader()

    def _end(self, end: End) -> None:
        if not self.ended:
            self.ended = True
            self.finish_reason, self.error = end.finish_reason, end.error
            self._notify()
        elif end.error is not None:
            self.error = end.error

    def _notify(self) -> None:
        on_end, self.on_end = self.on_end, lambda: None
        on_end()

    def _watch_reader(self) -> None:
        """Give the reader time from now on, if it has something to take and none was given."""
        if self._chunks and self._stall_timer is None:
            self._last_taken_s = self._loop.time()
            self._watch(self._owner.stall_timeout_s)

    def _watch(self, delay_s: float) -> None:
        self._stall_timer = self._loop.call_later(delay_s, self._check_reader)

    def _check_reader(self) -> None:
        self._stall_timer = None
        if not self._chunks:
            return
        left_s = self._last_taken_s + self._owner.stall_timeout_s - self._loop.time()
        if left_s > 0:
            self._watch(left_s)
        else:
            self._owner.stalled(self)
