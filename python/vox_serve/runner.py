"""Runs the engine in its own thread and serves its requests as async streams of PCM chunks.

One thread calls the engine; the event loop never waits for it. Requests wait here, in a line that
is fair between clients; the engine holds only those that it speaks. Texts are tokenized in further
threads, so that one client's long text delays no other client. A request leaves its place when it
is spoken, however slow its reader is; its unread audio is bounded, and a reader that stalls is
dropped.

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
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from vox_serve.client_pace import ClientPace
from vox_serve.config import ServerSettings
from vox_serve.engine_thread import AnyEngine, EngineThread, client_error
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
    ShuttingDown,
)
from vox_serve.line_pace import LATEST
from vox_serve.measures import Counts, Measures
from vox_serve.preparing import Preparing
from vox_serve.stream_gate import StreamGate
from vox_serve.unread import UnreadAudio

if TYPE_CHECKING:
    from vox_serve.request import Prompt, Request

__all__ = ["EngineFailure", "Job", "QueueFull", "RequestFailed", "RequestRefused", "Runner"]

logger = logging.getLogger("vox_serve")

NO_TIME = "the streams that are being spoken leave no time for another: try later"
SHUTTING_DOWN = "the server is shutting down"
WARMING_UP = "the server is warming up"

EXIT_ENGINE_FAILED = 70
"""Exit code (EX_SOFTWARE) after which a supervisor should start the process again."""

SHORT_CHARS = 512
"""Longer texts are slow to tokenize: of a client's, one is tokenized at a time."""

CANCEL_BURST = 50
"""Requests that a client may give up at once, if it gave up none for a while."""

MAX_RETRY_AFTER_S = 3600
JOIN_TIMEOUT_S = 10.0


class Runner:
    """Runs an engine in one thread and its `prepare` in others.

    Args:
        engine: nothing else may call it while the runner runs.
        max_jobs: most requests that are spoken or wait.
        max_unread_bytes: limit for the audio that waits for its readers.
        stall_timeout_s: a reader that takes nothing for so long is dropped.
        gate: refuses streams that would wait for too long; None refuses none.
        max_cancels_per_s: requests a second that a client may give up; 0 for no limit.

    Attributes:
        failure: why the engine can serve no more; None while it can.
        draining: no new request is begun.
        exit_code: what the process should return.
        measures: for `/metrics`.
        warm_up: called in the engine's thread before the first request; set it before `start`.
        is_warm: set when that has ended.
        on_failure: called in the engine's thread when the engine can serve no more.
        on_drain: called when `drain` begins.
    """

    def __init__(
        self,
        engine: AnyEngine,
        max_jobs: int,
        max_unread_bytes: int = 2**28,
        stall_timeout_s: float = 30.0,
        gate: StreamGate | None = None,
        max_cancels_per_s: float = 0.0,
    ):
        self.engine = engine
        self.max_jobs = max_jobs
        self.stall_timeout_s = stall_timeout_s
        self.failure: str | None = None
        self.draining = False
        self.exit_code = 0
        self.warm_up: Callable[[], object] | None = None
        self.is_warm = threading.Event()
        self.on_failure: Callable[[], None] = lambda: None
        self.on_drain: list[Callable[[], None]] = []
        self.counts = Counts()
        self.measures = Measures()
        self._unread = UnreadAudio(max_unread_bytes)
        self._queue: FairQueue[Job] = FairQueue(
            min(engine.max_batch_size, max_jobs), max_jobs, engine.num_spare_rows
        )
        self._jobs: dict[str, Job] = {}  # until their readers leave
        self._durations_s: deque[float] = deque([1.0], maxlen=64)
        self._on_empty: Callable[[], object] = lambda: None
        self._num_unbuilt = 0  # contexts to prefill, replaced ones included
        self._cancels = ClientPace(max_cancels_per_s, CANCEL_BURST)
        # Guards the attributes above.
        self._lock = threading.Condition(threading.Lock())
        self._preparing = Preparing()
        self.gate = gate
        self._thread = EngineThread(engine, self._queue, self._lock, office=self, gate=gate)

    @classmethod
    def for_config(cls, engine: AnyEngine, config: ServerSettings) -> "Runner":
        """A runner of `engine` with the server's limits."""
        return cls(
            engine,
            max_jobs=engine.max_batch_size + config.max_queue_size,
            max_unread_bytes=config.max_unread_bytes,
            stall_timeout_s=config.stall_timeout_s,
            gate=StreamGate(engine, config.max_wait_s) if config.policy == "deadline" else None,
            max_cancels_per_s=config.max_cancels_per_s,
        )

    def start(self) -> None:
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """True while a thread works that `stop` could not wait for."""
        return self._thread.is_alive or self._preparing.is_busy

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
        for call in self.on_drain:
            call()
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

    def submit(
        self,
        request: "Request",
        client: str = "",
        streaming: bool = True,
        keeps_frames: bool = False,
    ) -> Job:
        """Queue a request. Call this on the event loop that will read the job.

        Args:
            request: the request to run.
            client: whose request it is, for fairness.
            streaming, keeps_frames: see `Job`.

        Raises:
            QueueFull: `max_jobs` are open.
            EngineFailure: the engine stopped.
        """
        job = Job(request, client, streaming, self, keeps_frames)
        with self._lock:
            if self.failure or self.draining:
                kind = ShuttingDown if self.draining else EngineFailure
                raise kind(self.failure or SHUTTING_DOWN, self._retry_after_s())
            if self._must_wait_too_long(job):
                raise self._queue_full(NO_TIME)
            try:
                evicted = self._queue.put(job, client)
            except LineFull:
                raise self._queue_full() from None
            self._jobs[request.id] = job
            full = self._queue_full() if evicted is not None else None
        if evicted is not None:
            evicted.post(End(error=full))
        if streaming and self.gate is not None:
            job.wait_for_place(LATEST * self.gate.max_wait_s)
        slow = len(request.text) > SHORT_CHARS
        try:
            self._preparing.start(partial(self._prepare, job), client, slow)
        except RuntimeError:  # no more threads
            job.ended = True
            job.close()
            with self._lock:
                raise self._queue_full() from None
        return job

    def prefill_later(
        self,
        client: str,
        key: str,
        build: "Callable[[], Prompt]",
        is_wanted: Callable[[], bool],
    ) -> None:
        """Prefill a context while the engine has no request; see `IdlePrefill.put`."""
        with self._lock:
            if self.failure or self.draining:
                return
            self.engine.idle_prefill.put(client, key, build, is_wanted)
            self._num_unbuilt += 1
            if self._num_unbuilt > 1:  # the thread that builds them will see it
                return
        try:
            self._preparing.start(self._build_contexts, client="", slow=True)
        except RuntimeError:  # no more threads
            with self._lock:
                self._num_unbuilt = 0

    def _build_contexts(self) -> None:
        """Build the contexts to prefill. Runs in a thread of its own."""
        is_done = False
        while not is_done:
            try:
                self.engine.idle_prefill.build_next()
            except Exception:  # a request will say what is wrong with it, if anything is
                logger.exception("a context cannot be prefilled")
            with self._lock:
                self._num_unbuilt -= 1
                is_done = self._num_unbuilt <= 0
                self._lock.notify()

    def start_encoding(self, call: Callable[[], None], client: str) -> None:
        """Run a call that must not raise in the thread that encodes recordings.

        Raises:
            RuntimeError: the system gives no more threads.
        """
        self._preparing.start_encoding(call, client)

    @property
    def status(self) -> tuple[str, str | None]:
        """The words "ok", "draining", "failed" or "warming", and why no request should be sent."""
        if self.draining and not self.exit_code:
            return "draining", SHUTTING_DOWN
        if self.warm_up is not None and not self.is_warm.is_set():
            return "warming", WARMING_UP
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

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for a place."""
        return self._queue.num_waiting

    # A job calls the methods from here to `count_unread`.

    def spoke_first(self, job: Job) -> None:
        if job.listener is not None:
            self.measures.first_audio_s.observe(asyncio.get_running_loop().time() - job.submitted_s)

    def close(self, job: Job) -> None:
        with self._lock:
            if self._jobs.pop(job.request.id, None) is None:
                return
            if job in self._queue:
                self._queue.remove(job)
                self._thread.abort(job.request.id)
            if not job.ended:
                self.counts.cancelled += 1
            if job.finish_reason == "interrupted":
                self._count_finished("interrupted")
            if not job.ended or job.finish_reason == "interrupted":
                self._cancels.count(job.client, time.monotonic())
            if not self._jobs:
                self._on_empty()

    def resume(self) -> None:
        with self._lock:
            self._lock.notify()

    def waited(self, job: Job) -> None:
        with self._lock:
            if not self._queue.is_waiting(job):
                return
            self._queue.remove(job)
            error = self._queue_full(NO_TIME)
        job.drop(error)

    def stalled(self, job: Job) -> None:
        self._drop(job, f"its reader took nothing for {self.stall_timeout_s:g} s")

    def count_unread(self, job: Job, num_bytes: int) -> None:
        if (largest := self._unread.count(job, num_bytes)) is None:
            return
        if largest.streaming or (largest.ended and not largest.is_encoding):
            self._drop(largest, f"it left {largest.unread_bytes} bytes of audio unread")
            return
        with self._lock:  # a whole answer in the making: its reader could not take any of it
            self.counts.refused += 1
            message = "too much audio waits for its readers: try later"
            error = QueueFull(message, self._retry_after_s())
        largest.drop(error)

    def _drop(self, job: Job, reason: str) -> None:
        about = {"request_id": job.request_id}
        logger.warning("request %s was dropped: %s", job.request.id, reason, extra=about)
        with self._lock:
            self.counts.stalled += 1
        job.drop(ReaderStalled(f"the request was dropped: {reason}"))

    def _must_wait_too_long(self, job: Job) -> bool:
        """True if a new stream would wait for longer than it should. Needs the lock."""
        if self.gate is None or not job.streaming:
            return False
        num_ahead = self._queue.num_ahead(job.client)
        # Those in line that are tokenized or must pause, or have more places, do not go first.
        others = num_ahead and self._queue.peek(lambda other: not self.must_pause(other))
        is_next = not others and self._queue.has_place(job.client)
        if is_next and self.gate.is_open(job.request, job.streaming):
            return False
        return self.gate.wait_s(num_ahead) > self.gate.max_wait_s

    def _queue_full(self, message: str | None = None) -> QueueFull:
        """The error of a request that found no room, which is counted. Needs the lock."""
        self.counts.refused += 1
        message = message or f"{self.max_jobs} requests are waiting or being spoken: try later"
        return QueueFull(message, self._retry_after_s())

    def _retry_after_s(self) -> int:
        """Estimated time until a place is free for one more request. Needs the lock."""
        if self.gate is not None and self.engine.rows:
            wait_s = self.gate.wait_s(self._queue.num_waiting)
        else:
            rounds = (self._queue.num_waiting + 1) / self._queue.num_places
            wait_s = statistics.median(self._durations_s) * rounds
        return max(1, min(math.ceil(wait_s), MAX_RETRY_AFTER_S))

    def _fail_all(self, reason: str, kind: type[EngineFailure]) -> None:
        """End all jobs, and the engine's thread after its current step."""
        with self._lock:
            self.failure = self.failure or reason
            error = kind(self.failure, self._retry_after_s())
            jobs = list(self._jobs.values())
            self._thread.stop()
        for job in jobs:
            job.post(End(error=error))

    def _prepare(self, job: Job) -> None:
        """Tokenize a job's request and let it take its place. Runs in a thread of its own."""
        if job.closed:
            return
        try:
            job.progress.prompt = self.engine.prepare(job.request)
        except Exception as error:
            self.finish(job, End(error=client_error(job, error)))
            return
        with self._lock:
            self._queue.mark_ready(job)
            self._lock.notify()

    # The engine's thread calls the next four.

    def must_pause(self, job: Job) -> bool:
        """True while a job's client has given up too many requests. Needs the lock."""
        return self._cancels.delay_s(job.client, time.monotonic()) > 0

    def finish(self, job: Job, end: End, *chunks: Item) -> None:
        """Free a job's place and post its end."""
        with self._lock:
            self._queue.remove(job)
            if end.error is None:
                self._count_finished(str(end.finish_reason))
                started_s = job.progress.started_s
                if started_s is not None and job.request.feed is None:
                    spoken_s = time.monotonic() - started_s
                    self._durations_s.append(spoken_s)
                    self.measures.spoken(spoken_s, job.progress.num_frames, job.streaming)
            elif isinstance(end.error, RequestFailed):
                self.counts.failed += 1
            self._lock.notify()
        job.post(*chunks, end)

    def _count_finished(self, reason: str) -> None:
        self.counts.finished[reason] = self.counts.finished.get(reason, 0) + 1

    def count_fault(self, kind: Literal["non_finite", "recoveries"]) -> None:
        with self._lock:
            setattr(self.counts, kind, getattr(self.counts, kind) + 1)

    def give_up(self) -> None:
        """End all jobs and the server: the engine can serve no more."""
        self.exit_code = EXIT_ENGINE_FAILED
        self._fail_all("the engine failed", EngineFailure)
        self.on_failure()
