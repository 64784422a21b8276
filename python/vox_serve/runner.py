"""Runs the engine in its own thread and serves its requests as async streams of PCM chunks.

One thread calls the engine; the event loop never waits for it. Commands reach the thread through
one queue and run between two frames; audio returns through one queue per job. Another thread
tokenizes, so that a long text does not delay live requests. A job's queue holds at most its
utterance, 3,840 bytes a frame: 4.3 MB at 90 s, however slow its reader is. An unread job counts
against the limit on jobs, so total memory is bounded.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from vox_serve.audio import pcm16

if TYPE_CHECKING:
    from vox_serve.engine import FrameOutput, Prompt, Request

T = TypeVar("T")

logger = logging.getLogger("vox_serve")


class AnyEngine(Protocol):
    """The part of `vox_serve.engine.Engine` that the runner uses."""

    @property
    def has_work(self) -> bool: ...
    def prepare(self, request: "Request") -> "Prompt": ...
    def add(self, request: "Request", prompt: "Prompt") -> None: ...
    def step(self) -> "Sequence[FrameOutput]": ...
    def abort(self, request_id: str) -> None: ...


class RequestRefused(ValueError):  # noqa: N818
    """The engine rejects this request; the message says why."""


class QueueFull(RuntimeError):  # noqa: N818
    """The queue already holds as many requests as may wait."""


class EngineFailure(RuntimeError):  # noqa: N818
    """The engine can no longer serve; the message says why."""


class Job:
    """Async iterator over one request's PCM chunks, one per frame; use it inside `with`.

    Leaving the `with` block before the end aborts the request.

    Args:
        request: the request to run.
        on_close: called with the job, from any thread, whenever it is given up; idempotent.

    Raises:
        RequestRefused: on the first chunk, when the engine rejects the request.
        EngineFailure: on any chunk, when the engine stopped.
    """

    def __init__(self, request: "Request", on_close: "Callable[[Job], None]"):
        self.request = request
        self.num_frames = 0
        self.ended = False
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> bytes:
        if self.ended and self._items.empty():
            raise StopAsyncIteration
        item = await self._items.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Give the job up; abort it unless it ended. Idempotent."""
        self._on_close(self)

    def post(self, *items: bytes | Exception | None) -> None:
        """Queue chunks; None or an exception ends the job. Callable from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._receive, items)
        except RuntimeError:  # the loop is closed: the reader is gone
            self._on_close(self)

    def _receive(self, items: Sequence[bytes | Exception | None]) -> None:
        for item in items:
            if self.ended:
                return
            self.num_frames += isinstance(item, bytes)
            self.ended = not isinstance(item, bytes)
            self._items.put_nowait(item)


class Runner:
    """Runs an engine in one thread and its `prepare` in another.

    Args:
        engine: nothing else may call it while the runner runs.
        max_jobs: limit on open requests: live, waiting and unread together.
    """

    def __init__(self, engine: AnyEngine, max_jobs: int):
        self.engine = engine
        self.max_jobs = max_jobs
        self.failure: str | None = None
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()  # guards `_jobs` and `failure`
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")

    def start(self) -> None:
        self._thread.start()

    def request_stop(self) -> None:
        """End all jobs now with `EngineFailure`, and the thread after its current step."""
        self._fail("the server is shutting down")
        self._commands.put(None)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def stop(self) -> None:
        """Call `request_stop` and wait for the threads."""
        self.request_stop()
        await asyncio.to_thread(self._tokenizing.shutdown)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def submit(self, request: "Request") -> Job:
        """Queue a request. Call this on the event loop that will read the job.

        Raises:
            QueueFull: `max_jobs` are open.
            EngineFailure: the engine stopped.
        """
        job = Job(request, on_close=self._close)
        with self._lock:
            if self.failure:
                raise EngineFailure(self.failure)
            if len(self._jobs) >= self.max_jobs:
                raise QueueFull(f"{self.max_jobs} requests are waiting or being spoken: try later")
            self._jobs[request.id] = job
            self._tokenizing.submit(self._prepare, job)
        return job

    def count_jobs(self) -> tuple[int, int]:
        """Count the jobs that are being spoken, and those that wait for their first frame."""
        with self._lock:
            open_jobs = [job for job in self._jobs.values() if not job.ended]
        live = sum(job.num_frames > 0 for job in open_jobs)
        return live, len(open_jobs) - live

    def _close(self, job: Job) -> None:
        with self._lock:
            was_open = self._jobs.pop(job.request.id, None) is job
        if was_open and not job.ended:
            self._commands.put(partial(self.engine.abort, job.request.id))

    def _fail(self, reason: str) -> None:
        with self._lock:
            self.failure = self.failure or reason
            jobs = list(self._jobs.values())
        for job in jobs:
            job.post(EngineFailure(self.failure))

    def _prepare(self, job: Job) -> None:
        """Tokenize a job's request, then queue it for the engine. Runs in the tokenizing thread."""
        prompt = self._attempt(job, self.engine.prepare, job.request)
        if prompt is not None:
            self._commands.put(partial(self._attempt, job, self.engine.add, job.request, prompt))

    def _attempt(self, job: Job, call: Callable[..., T], *args: object) -> T | None:
        """Return the call's result; None if the job was given up or ends here with an error."""
        with self._lock:
            given_up = self._jobs.get(job.request.id) is not job
        if given_up:
            return None
        try:
            return call(*args)
        except ValueError as error:
            job.post(RequestRefused(str(error)))
        except Exception as error:
            logger.exception("request %s failed", job.request.id)
            job.post(EngineFailure(f"the request failed: {type(error).__name__}: {error}"))
        return None

    # The methods below run in the engine's thread only.

    def _run(self) -> None:
        try:
            while self._run_commands():
                if self.engine.has_work:
                    self._deliver(self.engine.step())
        except Exception as error:
            logger.exception("the engine failed")
            self._fail(f"the engine failed: {type(error).__name__}: {error}")
        finally:
            self._fail("the engine's thread has ended")

    def _run_commands(self) -> bool:
        """Run queued commands, waiting for one when the engine is idle; False to stop."""
        while not (self._commands.empty() and self.engine.has_work):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _deliver(self, outputs: "Sequence[FrameOutput]") -> None:
        with self._lock:
            jobs = [self._jobs.get(output.request_id) for output in outputs]
        for job, output in zip(jobs, outputs, strict=True):
            if job is None:
                continue
            items: list[bytes | None] = []
            if output.audio is not None:
                items.append(pcm16(output.audio).tobytes())
            if output.finish_reason is not None:
                items.append(None)
            job.post(*items)
