"""Runs the engine in its own thread and serves its requests as async streams of PCM chunks.

One thread calls the engine; the event loop never waits for it. Requests wait here, in a line that
is fair between clients; the engine holds only those that it speaks. Texts are tokenized in further
threads, so that a long one delays no other. A request leaves its place when it is spoken, however
slow its reader is; its unread audio is bounded, and a reader that stalls is dropped.

A step that fails ends the streams that it cuts. The engine starts again, and with it all requests
of which nothing was sent (see recovery.py).
"""

import asyncio
import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from vox_serve.audio import pcm16
from vox_serve.config import ServerSettings
from vox_serve.ending import delivered_audio
from vox_serve.fair_queue import FairQueue, LineFull
from vox_serve.job import (
    End,
    EngineFailure,
    Item,
    Job,
    QueueFull,
    ReaderStalled,
    RequestFailed,
    RequestRefused,
    Restart,
    ShuttingDown,
)
from vox_serve.preparing import Preparing
from vox_serve.recovery import Suspects
from vox_serve.unread import UnreadAudio

if TYPE_CHECKING:
    from vox_serve.request import FrameOutput, Prompt, Request

__all__ = ["EngineFailure", "Job", "QueueFull", "RequestFailed", "RequestRefused", "Runner"]

logger = logging.getLogger("vox_serve")

INTERNAL_ERROR = "the request failed: internal error"
"""All that a client learns of an exception; the log has the rest."""

SHUTTING_DOWN = "the server is shutting down"

EXIT_ENGINE_FAILED = 70
"""Exit code (EX_SOFTWARE) after which a supervisor should start the process again."""

MAX_FRUITLESS_FAILURES = 32
"""Failed steps without a frame between them, after which a restart of the engine does not help."""

SHORT_CHARS = 512
CHARS_PER_NICENESS = 100
"""Texts that are not short are tokenized at a lower priority, the longer the lower."""

MAX_RETRY_AFTER_S = 3600
JOIN_TIMEOUT_S = 10.0


class AnyEngine(Protocol):
    """The part of `vox_serve.engine.Engine` that the runner uses."""

    max_batch_size: int
    num_spare_rows: int

    @property
    def has_work(self) -> bool: ...
    def prepare(self, request: "Request") -> "Prompt": ...
    def add(self, request: "Request", prompt: "Prompt") -> None: ...
    def step(self) -> "Sequence[FrameOutput]": ...
    def abort(self, request_id: str) -> None: ...
    def reset(self) -> None: ...


@dataclass
class Counts:
    """Requests since the start.

    Attributes:
        finished: spoken, by finish reason.
        cancelled: given up by their clients.
        failed: ended by an exception or by numbers that are not finite.
        non_finite: the latter of these.
        refused: answered 429.
        stalled: dropped because nobody read their audio.
        recoveries: failed steps after which the engine went on.
    """

    finished: dict[str, int] = field(default_factory=dict)
    cancelled: int = 0
    failed: int = 0
    non_finite: int = 0
    refused: int = 0
    stalled: int = 0
    recoveries: int = 0


class Runner:
    """Runs an engine in one thread and its `prepare` in others.

    Args:
        engine: nothing else may call it while the runner runs.
        max_jobs: most requests that are spoken or wait.
        max_unread_bytes: limit for the audio that waits for its readers.
        stall_timeout_s: a reader that takes nothing for so long is dropped.

    Attributes:
        failure: why the engine can serve no more; None while it can.
        draining: no new request is begun.
        exit_code: what the process should return.
        on_failure: called in the engine's thread when the engine can serve no more.
    """

    def __init__(
        self,
        engine: AnyEngine,
        max_jobs: int,
        max_unread_bytes: int = 2**28,
        stall_timeout_s: float = 30.0,
    ):
        self.engine = engine
        self.max_jobs = max_jobs
        self.stall_timeout_s = stall_timeout_s
        self.failure: str | None = None
        self.draining = False
        self.exit_code = 0
        self.on_failure: Callable[[], None] = lambda: None
        self.counts = Counts()
        self._unread = UnreadAudio(max_unread_bytes)
        self._queue: FairQueue[Job] = FairQueue(
            min(engine.max_batch_size, max_jobs), max_jobs, engine.num_spare_rows
        )
        self._jobs: dict[str, Job] = {}  # until their readers leave
        self._aborted: list[str] = []
        self._durations_s: deque[float] = deque([1.0], maxlen=64)
        self._stopping = False
        self._on_empty: Callable[[], object] = lambda: None
        # Guards the attributes above; notified when the engine's thread has something to do.
        self._lock = threading.Condition(threading.Lock())
        self._preparing = Preparing()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # The attributes below belong to the engine's thread.
        self._running: dict[str, Job] = {}
        self._suspects = Suspects()
        self._num_fruitless = 0

    @classmethod
    def for_config(cls, engine: AnyEngine, config: ServerSettings) -> "Runner":
        """A runner of `engine` with the server's limits."""
        return cls(
            engine,
            max_jobs=engine.max_batch_size + config.max_queue_size,
            max_unread_bytes=config.max_unread_bytes,
            stall_timeout_s=config.stall_timeout_s,
        )

    def start(self) -> None:
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """True while a thread works that `stop` could not wait for."""
        return self._thread.is_alive() or self._preparing.is_busy

    @property
    def unread_bytes(self) -> int:
        """Audio that waits for its readers."""
        return self._unread.num_bytes

    def request_stop(self) -> None:
        """End all jobs now with `ShuttingDown`, and the thread after its current step."""
        self._fail_all(SHUTTING_DOWN, ShuttingDown)

    async def stop(self) -> None:
        """Call `request_stop` and wait for the engine's thread."""
        self.request_stop()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)

    async def drain(self, within_s: float) -> None:
        """Refuse what is not begun, and wait until the rest is spoken and read, or time is over."""
        loop = asyncio.get_running_loop()
        emptied = asyncio.Event()
        with self._lock:
            self.draining = True
            self._on_empty = lambda: loop.call_soon_threadsafe(emptied.set)
            error = ShuttingDown(SHUTTING_DOWN, self._retry_after_s())
            waiting = self._queue.remove_waiting()
            if not self._jobs:
                return
        for job in waiting:
            job.post(End(error=error))
        try:
            await asyncio.wait_for(emptied.wait(), within_s)
        except TimeoutError:
            logger.warning("the shutdown cuts %d requests", len(self._jobs))
        finally:
            self._on_empty = lambda: None

    def submit(self, request: "Request", client: str = "", streaming: bool = True) -> Job:
        """Queue a request. Call this on the event loop that will read the job.

        Args:
            request: the request to run.
            client: whose request it is, for fairness.
            streaming: see `Job`.

        Raises:
            QueueFull: `max_jobs` are open.
            EngineFailure: the engine stopped.
        """
        job = Job(request, client, streaming, owner=self)
        with self._lock:
            if self.failure or self.draining:
                kind = ShuttingDown if self.draining else EngineFailure
                raise kind(self.failure or SHUTTING_DOWN, self._retry_after_s())
            try:
                evicted = self._queue.put(job, client)
            except LineFull:
                raise self._queue_full() from None
            self._jobs[request.id] = job
            full = self._queue_full() if evicted is not None else None
        if evicted is not None:
            evicted.post(End(error=full))
        num_chars = len(request.text)
        niceness = 0 if num_chars <= SHORT_CHARS else min(num_chars // CHARS_PER_NICENESS, 19)
        try:
            self._preparing.start(partial(self._prepare, job), niceness)
        except RuntimeError:  # no more threads
            job.ended = True
            job.close()
            with self._lock:
                raise self._queue_full() from None
        return job

    @property
    def status(self) -> tuple[str, str | None]:
        """The words "ok", "draining" or "failed", and why no request is taken."""
        if self.draining and not self.exit_code:
            return "draining", SHUTTING_DOWN
        return ("failed" if self.failure else "ok"), self.failure

    def totals(self) -> dict[str, Any]:
        """`counts` as a dict."""
        with self._lock:
            return asdict(self.counts)

    def count_jobs(self) -> tuple[int, int]:
        """Count the jobs that are being spoken, and those that wait for their first frame."""
        with self._lock:
            open_jobs = [job for job in self._jobs.values() if not job.ended]
        live = sum(job.num_frames > 0 for job in open_jobs)
        return live, len(open_jobs) - live

    # A job calls the next three.

    def close(self, job: Job) -> None:
        with self._lock:
            if self._jobs.pop(job.request.id, None) is None:
                return
            if job in self._queue:
                self._queue.remove(job)
                self._aborted.append(job.request.id)
                self._lock.notify()
            self.counts.cancelled += not job.ended
            if not self._jobs:
                self._on_empty()

    def stalled(self, job: Job) -> None:
        self._drop(job, f"its reader took nothing for {self.stall_timeout_s:g} s")

    def count_unread(self, job: Job, num_bytes: int) -> None:
        if (largest := self._unread.count(job, num_bytes)) is not None:
            self._drop(largest, f"it left {largest.unread_bytes} bytes of audio unread")

    def _drop(self, job: Job, reason: str) -> None:
        logger.warning("request %s was dropped: %s", job.request.id, reason)
        with self._lock:
            self.counts.stalled += 1
        job.drop(ReaderStalled(f"the request was dropped: {reason}"))

    def _queue_full(self) -> QueueFull:
        """The error of a request that found no room, which is counted. Needs the lock."""
        self.counts.refused += 1
        message = f"{self.max_jobs} requests are waiting or being spoken: try later"
        return QueueFull(message, self._retry_after_s())

    def _retry_after_s(self) -> int:
        """Estimated time until a place is free for one more request. Needs the lock."""
        rounds = (self._queue.num_waiting + 1) / self._queue.num_places
        wait_s = statistics.median(self._durations_s) * rounds
        return max(1, min(math.ceil(wait_s), MAX_RETRY_AFTER_S))

    def _fail_all(self, reason: str, kind: type[EngineFailure]) -> None:
        """End all jobs, and the engine's thread after its current step."""
        with self._lock:
            self.failure = self.failure or reason
            self._stopping = True
            error = kind(self.failure, self._retry_after_s())
            jobs = list(self._jobs.values())
            self._lock.notify()
        for job in jobs:
            job.post(End(error=error))

    def _prepare(self, job: Job) -> None:
        """Tokenize a job's request and let it take its place. Runs in a thread of its own."""
        if job.closed:
            return
        try:
            job.progress.prompt = self.engine.prepare(job.request)
        except Exception as error:
            self._finish(job, End(error=_client_error(job, error)))
            return
        with self._lock:
            self._queue.mark_ready(job)
            self._lock.notify()

    def _finish(self, job: Job, end: End, *chunks: Item) -> None:
        """Free a job's place and post its end."""
        with self._lock:
            self._queue.remove(job)
            if end.error is None:
                finished, reason = self.counts.finished, str(end.finish_reason)
                finished[reason] = finished.get(reason, 0) + 1
                if (started_s := job.progress.started_s) is not None:
                    self._durations_s.append(time.monotonic() - started_s)
            elif isinstance(end.error, RequestFailed):
                self.counts.failed += 1
            self._lock.notify()
        job.post(*chunks, end)

    # The methods below run in the engine's thread only.

    def _run(self) -> None:
        try:
            while self._tick():
                pass
        except Exception:
            logger.exception("the engine's thread failed")
            self._give_up()

    def _tick(self) -> bool:
        """Make one frame of all running jobs, or wait for one to run; False to stop."""
        with self._lock:
            self._lock.wait_for(self._has_work)
            aborted, self._aborted = self._aborted, []
            stopping = self._stopping
        try:
            for request_id in aborted:
                self._leave(request_id)
            if stopping:
                for request_id in list(self._running):
                    self._leave(request_id)
                return False
            for job in self._next_jobs():
                self._begin(job)
            if self.engine.has_work:
                self._deliver(self.engine.step())
            elif self._running:
                raise RuntimeError(f"the engine lost {len(self._running)} requests")
        except Exception as error:
            self._recover(error)
        return True

    def _has_work(self) -> bool:
        return bool(
            self._stopping
            or self._aborted
            or self._running
            or self._suspects
            or self._queue.can_take
        )

    def _next_jobs(self) -> list[Job]:
        jobs = self._suspects.next_jobs()
        if self._suspects.trial is None:
            with self._lock:
                while (job := self._queue.take()) is not None:
                    jobs.append(job)
        return jobs

    def _begin(self, job: Job) -> None:
        progress, request_id = job.progress, job.request.id
        if progress.started_s is None:
            progress.started_s = time.monotonic()
        progress.num_frames = 0
        assert progress.prompt is not None
        self._running[request_id] = job
        try:
            self.engine.add(job.request, progress.prompt)
        except Exception as error:
            self._forget(request_id)
            self._finish(job, End(error=_client_error(job, error)))

    def _leave(self, request_id: str) -> None:
        self._forget(request_id)
        self.engine.abort(request_id)

    def _forget(self, request_id: str) -> None:
        if (job := self._running.pop(request_id, None)) is not None:
            self._suspects.ended(job)

    def _deliver(self, outputs: "Sequence[FrameOutput]") -> None:
        for output in outputs:
            job = self._running.get(output.request_id)
            if job is None:
                continue
            self._num_fruitless = 0
            if output.finish_reason is None and self._suspects.passed(job):
                self._leave(output.request_id)
                continue
            chunks: list[Item] = []
            if (audio := delivered_audio(output)) is not None:
                job.progress.num_frames += 1
                chunks.append(pcm16(audio).tobytes())
            if output.finish_reason is None:
                job.post(*chunks)
                continue
            self._forget(output.request_id)
            error = None
            if output.finish_reason == "error":
                error = RequestFailed(output.error or INTERNAL_ERROR)
                with self._lock:
                    self.counts.non_finite += 1
            self._finish(job, End(output.finish_reason, error), *chunks)

    def _recover(self, error: Exception) -> None:
        """Start the engine again after a failed step, and what can be repeated with it."""
        logger.error(
            "the engine failed in a step with %d requests", len(self._running), exc_info=error
        )
        jobs = list(self._running.values())
        self._running.clear()
        self._num_fruitless += 1
        if self._num_fruitless > MAX_FRUITLESS_FAILURES or _is_poisoned(error) or not self._reset():
            self._give_up()
            return
        with self._lock:
            self.counts.recoveries += 1
        repeatable = [job for job in jobs if not (job.streaming and job.progress.num_frames)]
        refused = self._suspects.accuse(repeatable, alone=len(jobs) == 1)
        for job in jobs:
            if job in refused or job not in repeatable:
                self._finish(job, End("error", RequestFailed(INTERNAL_ERROR)))
            else:
                job.post(Restart())

    def _reset(self) -> bool:
        try:
            self.engine.reset()
        except Exception:
            logger.exception("the engine cannot start again")
            return False
        return True

    def _give_up(self) -> None:
        self.exit_code = EXIT_ENGINE_FAILED
        self._fail_all("the engine failed", EngineFailure)
        self.on_failure()


def _client_error(job: Job, error: Exception) -> Exception:
    """The error that a request's client gets for an exception, which is logged if it is a bug."""
    if isinstance(error, ValueError):
        return RequestRefused(str(error))
    logger.error("request %s failed", job.request.id, exc_info=error)
    return RequestFailed(INTERNAL_ERROR)


def _is_poisoned(error: Exception) -> bool:
    """True if no later call on the device can succeed in this process."""
    import torch

    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
