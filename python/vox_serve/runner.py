"""The engine on a thread of its own, its requests as async streams of PCM chunks.

One thread calls the engine; the event loop never waits for it. Commands go to the thread through
one queue and run between two frames, audio comes back through one queue per job. Another thread
tokenizes, so that a long text keeps no live request waiting. A job's queue holds at most its
utterance, 3,840 bytes a frame: 4.3 MB at 90 s, however slow its reader is. An unread job counts
against the limit on jobs, so memory is bounded as a whole.
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
    """What the runner needs of `vox_serve.engine.Engine`."""

    @property
    def has_work(self) -> bool: ...
    def prepare(self, request: "Request") -> "Prompt": ...
    def add(self, request: "Request", prompt: "Prompt") -> None: ...
    def step(self) -> "Sequence[FrameOutput]": ...
    def abort(self, request_id: str) -> None: ...


class RequestRefused(ValueError):  # noqa: N818
    """The engine does not take this request; the message says why."""


class QueueFull(RuntimeError):  # noqa: N818
    """As many requests as may wait are waiting."""


class EngineFailure(RuntimeError):  # noqa: N818
    """The engine serves no more; the message says why."""


class Job:
    """One request's PCM chunks, one per frame: an async iterator, to be used inside `with`.

    Leaving the `with` block before the end aborts the request.

    Raises:
        RequestRefused: on the first chunk, when the engine does not take the request.
        EngineFailure: on any, when the engine stopped.
    """

    def __init__(self, runner: "Runner", request: "Request"):
        self.request = request
        self.num_frames = 0
        self.ended = False
        self._runner = runner
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
        """Give the job up: abort it unless it ended. Idempotent."""
        self._runner._close(self)

    def post(self, *items: bytes | Exception | None) -> None:
        """Hand over chunks, then None or an exception as the end. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._receive, items)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self._runner._close(self)

    def _receive(self, items: Sequence[bytes | Exception | None]) -> None:
        for item in items:
            if self.ended:
                return
            self.num_frames += isinstance(item, bytes)
            self.ended = not isinstance(item, bytes)
            self._items.put_nowait(item)


class Runner:
    """Runs an engine on a thread, and its `prepare` on another.

    Args:
        engine: no one else may call it while the runner runs.
        max_jobs: requests that may be open at once, spoken, waiting and unread together.
    """

    def __init__(self, engine: AnyEngine, max_jobs: int):
        self.engine = engine
        self.max_jobs = max_jobs
        self.failure: str | None = None
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()  # over `_jobs` and `failure`
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")

    def start(self) -> None:
        self._thread.start()

    def request_stop(self) -> None:
        """End all jobs at once with `EngineFailure`, and the thread after its current step."""
        self._fail("the server is shutting down")
        self._commands.put(None)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def stop(self) -> None:
        """`request_stop`, and wait for the threads."""
        self.request_stop()
        await asyncio.to_thread(self._tokenizing.shutdown)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    def submit(self, request: "Request") -> Job:
        """Put a request in line. Call it on the event loop that will read the job.

        Raises:
            QueueFull: `max_jobs` are open.
            EngineFailure: the engine stopped.
        """
        job = Job(self, request)
        with self._lock:
            if self.failure:
                raise EngineFailure(self.failure)
            if len(self._jobs) >= self.max_jobs:
                raise QueueFull(f"{self.max_jobs} requests are waiting or being spoken: try later")
            self._jobs[request.id] = job
            self._tokenizing.submit(self._prepare, job)
        return job

    def count_jobs(self) -> tuple[int, int]:
        """Jobs that are being spoken, and jobs that wait for their first frame."""
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
        """On the tokenizing thread."""
        prompt = self._attempt(job, self.engine.prepare, job.request)
        if prompt is not None:
            self._commands.put(partial(self._attempt, job, self.engine.add, job.request, prompt))

    def _attempt(self, job: Job, call: Callable[..., T], *args: object) -> T | None:
        """What the call returns; None if the job was given up, or ends here with an error."""
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

    # Below: on the engine's thread only.

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
        """Run what waits, and wait if there is nothing else to do; False at the end."""
        while not (self._commands.empty() and self.engine.has_work):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _deliver(self, outputs: "Sequence[FrameOutput]") -> None:
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue
            items = [] if output.audio is None else [pcm16(output.audio).tobytes()]
            if output.finish_reason is not None:
                items.append(None)
            job.post(*items)
