"""The thread that runs the engine: starts jobs, delivers their frames, recovers from faults."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from vox_serve.audio import pcm16
from vox_serve.ending import delivered_audio
from vox_serve.fair_queue import FairQueue
from vox_serve.job import (
    End,
    Item,
    Job,
    PartEnd,
    RequestFailed,
    RequestRefused,
    Restart,
    SpokenFrame,
)
from vox_serve.measures import Measures
from vox_serve.recovery import Suspects
from vox_serve.stream_gate import StreamGate

if TYPE_CHECKING:
    from vox_serve.idle_prefill import IdlePrefill
    from vox_serve.mimi import Mimi
    from vox_serve.policy import Row
    from vox_serve.prompt import PromptBuilder, Segment
    from vox_serve.request import FrameOutput, Prompt, Request
    from vox_serve.speech_lengths import SpeechLengths
    from vox_serve.step_times import StepTimes

logger = logging.getLogger("vox_serve")

INTERNAL_ERROR = "the request failed: internal error"
"""All that a client learns of an exception; the log has the rest."""

MAX_FRUITLESS_FAILURES = 32
"""Failed steps without a frame between them, after which a reset of the engine does not help."""


GATE_POLL_S = 0.02
"""Time between two looks at a request that finds the gate closed, while the engine has no step to
do: the gate opens as time passes."""


class AnyEngine(Protocol):
    """The part of `vox_serve.engine.Engine` that the server uses."""

    max_batch_size: int
    num_spare_rows: int
    mimi: "Mimi"
    prompts: "PromptBuilder"

    @property
    def default_context(self) -> "Sequence[Segment]": ...

    times: "StepTimes"
    lengths: "SpeechLengths"
    idle_prefill: "IdlePrefill"

    @property
    def rows(self) -> "list[Row]": ...
    @property
    def has_work(self) -> bool: ...

    split_chars: int

    @property
    def part_chars(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def follows_context(self) -> bool: ...
    def cache_counts(self) -> dict[str, int]: ...
    def spoken_text(self, request: "Request") -> str: ...
    def prepare(self, request: "Request") -> "Prompt": ...
    def add(self, request: "Request", prompt: "Prompt") -> object: ...
    def step(self, held: "Collection[str]") -> "Sequence[FrameOutput]": ...
    def abort(self, request_id: str) -> None: ...
    def reset(self) -> None: ...


class Office(Protocol):
    """The part of the runner that the engine's thread uses."""

    measures: Measures
    warm_up: Callable[[], object] | None
    is_warm: threading.Event

    def finish(self, job: Job, end: End, *chunks: Item) -> None: ...
    def must_pause(self, job: Job) -> bool: ...
    def count_fault(self, kind: Literal["non_finite", "recoveries"]) -> None: ...
    def give_up(self) -> None: ...


class EngineThread:
    """Makes frames of the jobs that hold places.

    Args:
        engine: nothing else may call it while the thread runs, except its `prepare`.
        queue: where jobs get their places.
        lock: guards `queue`, and is notified when the thread has something to do.
        office: takes results.
        gate: who may take a place that is free; None for everybody.
    """

    def __init__(
        self,
        engine: AnyEngine,
        queue: FairQueue[Job],
        lock: threading.Condition,
        office: Office,
        gate: StreamGate | None = None,
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._lock = lock
        self._office = office
        self._gate = gate
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guarded by the lock.
        self._aborted: list[str] = []
        self._stopping = False
        # The thread's own.
        self._running: dict[str, Job] = {}
        self._suspects = Suspects()
        self._num_fruitless = 0

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, if it was started."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def abort(self, request_id: str) -> None:
        """Let a request leave the engine before the next step. Needs the lock."""
        self._aborted.append(request_id)
        self._lock.notify()

    def stop(self) -> None:
        """End the thread after its current step. Needs the lock."""
        self._stopping = True
        self._lock.notify()

    def _run(self) -> None:
        try:
            self._warm_up()
            while self._tick():
                pass
        except Exception:
            logger.exception("the engine's thread failed")
            self._office.give_up()

    def _warm_up(self) -> None:
        """Warm the engine up. If that fails, it starts again without."""
        try:
            if self._office.warm_up is not None:
                self._office.warm_up()
        except Exception:
            logger.exception("the warm-up failed")
            self._engine.reset()
        finally:
            self._office.is_warm.set()

    def _tick(self) -> bool:
        """Make one frame of all running jobs, or wait for one to run; False to stop."""
        with self._lock:
            while not (self._has_work() or self._may_prefill()):
                self._lock.wait(GATE_POLL_S if self._queue.can_take else None)
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
            is_busy = any(not job.is_starved for job in self._running.values())
            if self._engine.has_work:
                held = {i for i, job in self._running.items() if job.is_ahead}
                begun_s = time.monotonic()
                outputs = self._engine.step(held)
                now_s = time.monotonic()
                self._office.measures.steps_s.observe(now_s - begun_s)
                self._deliver(outputs, now_s)
                trial = self._suspects.trial
                if trial is not None and (trial.is_starved or trial.is_ahead):
                    self._suspects.ended(trial)  # the others do not wait for its client
            elif is_busy:
                raise RuntimeError(f"the engine lost {len(self._running)} requests")
            else:
                self._prefill_ahead()
        except Exception as error:
            self._recover(error)
        return True

    def _may_prefill(self) -> bool:
        """True if the engine has no request, and a context to prefill."""
        return self._engine.idle_prefill.has_work and not self._engine.has_work

    def _prefill_ahead(self) -> None:
        try:
            self._engine.idle_prefill.step()
        except Exception as error:  # nobody waits for it
            if _is_poisoned(error):
                raise
            logger.exception("a context cannot be prefilled")

    def _has_work(self) -> bool:
        """True if a tick has something to do. Needs the lock."""
        return bool(
            self._stopping
            or self._aborted
            or any(not (job.is_ahead or job.is_starved) for job in self._running.values())
            or self._suspects
            or self._next_in_line() is not None
        )

    def _next_jobs(self) -> Iterator[Job]:
        """The jobs to begin now. Each is begun before the next is asked for."""
        yield from self._suspects.next_jobs()
        while self._suspects.trial is None:
            with self._lock:
                if (job := self._next_in_line()) is None:
                    return
                self._queue.take(job)
                if self._gate is not None and job.streaming:
                    self._gate.admitted(self._queue.num_waiting)
                is_urgent = self._queue.holds_one_place(job)  # its client speaks nothing else
            job.request = replace(job.request, streams=job.streaming, urgent=is_urgent)
            yield job

    def _next_in_line(self) -> Job | None:
        """The job that may take a place now. Needs the lock."""
        # A stream that has to wait holds up further streams, and no whole answer.
        is_open: dict[bool, bool] = {}

        def accepts(job: Job) -> bool:
            if self._office.must_pause(job):
                return False
            if self._gate is None:
                return True
            if is_open.get(job.streaming, True):
                is_open[job.streaming] = self._gate.is_open(job.request, job.streaming)
            return is_open[job.streaming]

        return self._queue.peek(accepts)

    def _begin(self, job: Job) -> None:
        progress, request_id = job.progress, job.request.id
        if progress.started_s is None:
            progress.started_s = time.monotonic()
        progress.num_frames = 0
        assert progress.prompt is not None
        self._running[request_id] = job
        try:
            self._engine.add(job.request, progress.prompt)
        except Exception as error:
            self._forget(request_id)
            self._office.finish(job, End(error=client_error(job, error)))

    def _leave(self, request_id: str) -> None:
        self._forget(request_id)
        self._engine.abort(request_id)

    def _forget(self, request_id: str) -> None:
        if (job := self._running.pop(request_id, None)) is not None:
            self._suspects.ended(job)

    def _deliver(self, outputs: "Sequence[FrameOutput]", now_s: float) -> None:
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
                self._office.measures.frame(job.listener, now_s)
                if job.keeps_frames and output.codes is not None:
                    codes = output.codes.numpy().astype(np.int32)
                    chunks.append(SpokenFrame(output.part, codes))
                chunks.append(pcm16(audio).tobytes())
            if output.part_reason is not None:
                chunks.append(PartEnd(output.part, output.part_reason))
            if output.finish_reason is None:
                job.post(*chunks)
                continue
            self._forget(output.request_id)
            error: Exception | None = None
            if output.is_refused and not (job.streaming and job.progress.num_frames):
                error = RequestRefused(output.error)
            elif output.finish_reason == "error":
                error = RequestFailed(output.error or INTERNAL_ERROR)
                if not output.is_refused:
                    self._office.count_fault("non_finite")
            self._office.finish(job, End(output.finish_reason, error), *chunks)

    def _recover(self, error: Exception) -> None:
        """Start the engine again after a failed step, and what can be repeated with it."""
        logger.error(
            "the engine failed in a step with %d requests", len(self._running), exc_info=error
        )
        jobs = list(self._running.values())
        self._running.clear()
        self._num_fruitless += 1
        if self._num_fruitless > MAX_FRUITLESS_FAILURES or _is_poisoned(error) or not self._reset():
            self._office.give_up()
            return
        self._office.count_fault("recoveries")
        repeatable = [job for job in jobs if not (job.streaming and job.progress.num_frames)]
        refused = self._suspects.accuse(repeatable, alone=len(jobs) == 1)
        for job in jobs:
            if job in refused or job not in repeatable:
                self._office.finish(job, End("error", RequestFailed(INTERNAL_ERROR)))
            else:
                job.post(Restart())

    def _reset(self) -> bool:
        try:
            self._engine.reset()
        except Exception:
            logger.exception("the engine cannot start again")
            return False
        return True


def client_error(job: Job, error: Exception) -> Exception:
    """The error that a request's client gets for an exception, which is logged if it is a bug."""
    if isinstance(error, ValueError):
        return RequestRefused(str(error))
    about = {"request_id": job.request_id}
    logger.error("request %s failed", job.request.id, exc_info=error, extra=about)
    return RequestFailed(INTERNAL_ERROR)


def _is_poisoned(error: Exception) -> bool:
    """True if no later call on the device can succeed in this process."""
    import torch

    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
