"""Streams are taken while no listener would hear a gap, wait for a bounded time, or are refused."""

import asyncio

import pytest

from fake_engine import ENDLESS, FakeEngine
from runner_testing import read_job, run_with
from vox_serve.engine import Request
from vox_serve.job import MAX_AHEAD_BYTES, RESUME_BYTES, QueueFull
from vox_serve.policy import Row
from vox_serve.runner import CANCEL_BURST
from vox_serve.step_times import StepTimes
from vox_serve.stream_gate import StreamGate

FRAME_BYTES = 2 * 1920


class Gate:
    """A gate that a test opens."""

    def __init__(self, is_open: bool = False, wait_s: float = 0.0, max_wait_s: float = 5.0):
        self.opened, self.predicted_s, self.max_wait_s = is_open, wait_s, max_wait_s

    def is_open(self, request: Request, streaming: bool) -> bool:
        return self.opened or not streaming

    def wait_s(self, num_ahead: int) -> float:
        return self.predicted_s * (1 + num_ahead)

    def admitted(self, num_waiting: int) -> None: ...


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_a_stream_that_would_wait_for_too_long_is_refused_at_once():
    async def scenario(runner):
        with pytest.raises(QueueFull, match="leave no time") as refused:
            runner.submit(Request("Stream."))
        assert len(await read_job(runner.submit(Request("Whole."), streaming=False))) > 0
        gate.opened = True
        assert len(await read_job(runner.submit(Request("Stream.")))) > 0
        return refused.value.retry_after_s, runner.counts.refused

    gate = Gate(wait_s=7.2)
    retry_after_s, num_refused = run_with(FakeEngine(), scenario, gate=gate)
    assert (retry_after_s, num_refused) == (1, 1)  # an idle engine: no prediction


def test_a_stream_is_not_refused_for_others_that_are_being_tokenized():
    async def scenario(runner):
        jobs = [runner.submit(Request(f"Stream {i}.")) for i in range(2)]
        assert [len(await read_job(job)) for job in jobs] == [3 * FRAME_BYTES] * 2

    engine = FakeEngine(prepare_s=0.05)
    run_with(engine, scenario, gate=Gate(is_open=True, wait_s=7.2))


def test_a_stream_is_not_refused_for_the_line_of_a_client_that_has_places():
    async def scenario(runner):
        runner.submit(Request("Long.", max_frames=ENDLESS), "busy")
        await until(lambda: engine.requests)
        runner.submit(Request("In line."), "busy")
        await until(lambda: runner._queue.can_take)  # within the step of 0.2 s
        job = runner.submit(Request("Stream.", max_frames=1), "other")
        assert len(await read_job(job)) == FRAME_BYTES

    engine = FakeEngine(step_s=0.2)
    run_with(engine, scenario, gate=Gate(is_open=True, wait_s=7.2))


def test_a_stream_is_not_refused_for_the_line_of_a_client_that_must_pause():
    async def scenario(runner):
        for _ in range(CANCEL_BURST + 20):
            runner.submit(Request("Given up."), "bad").close()
        runner.submit(Request("In line."), "bad")
        await until(lambda: runner._queue.can_take)
        job = runner.submit(Request("Stream.", max_frames=1), "other")
        assert len(await read_job(job)) == FRAME_BYTES

    run_with(FakeEngine(), scenario, gate=Gate(is_open=True, wait_s=7.2), max_cancels_per_s=1)


def test_a_client_that_interrupts_many_answers_must_pause():
    async def scenario(runner):
        for _ in range(CANCEL_BURST + 20):
            runner.submit(Request("Interrupted."), "bad").interrupt()
        with runner.submit(Request("Next."), "bad") as job:
            await until(lambda: runner._queue.can_take)
            assert runner.must_pause(job)
        assert len(await read_job(runner.submit(Request("Other."), "other"))) == 3 * FRAME_BYTES

    run_with(FakeEngine(), scenario, max_cancels_per_s=1)


def test_a_stream_waits_for_the_gate_to_open():
    async def scenario(runner):
        job = runner.submit(Request("Stream."))
        whole = await read_job(runner.submit(Request("Whole."), "other", streaming=False))
        assert (len(whole), job.num_frames) == (3 * FRAME_BYTES, 0)
        gate.opened = True
        assert len(await read_job(job)) == 3 * FRAME_BYTES

    gate = Gate()
    run_with(FakeEngine(), scenario, gate=gate)


def test_a_stream_waits_no_longer_than_its_bound():
    async def scenario(runner):
        with pytest.raises(QueueFull, match="leave no time"):
            await read_job(runner.submit(Request("Stream.")))
        assert (len(runner._queue), runner._jobs) == (0, {})

    run_with(FakeEngine(), scenario, gate=Gate(max_wait_s=0.05))


def test_speech_is_made_ahead_of_its_reader_up_to_a_bound():
    """The engine rests meanwhile, and others are spoken."""

    async def scenario(runner):
        with runner.submit(Request("Endless.")) as job:
            await until(lambda: job.is_ahead)
            await until(lambda: runner.engine.num_steps == steps_after_a_while())
            assert 0 <= job.unread_bytes - MAX_AHEAD_BYTES <= 20 * FRAME_BYTES
            short = runner.submit(Request("Other.", max_frames=2), "other")
            assert len(await read_job(short)) == 2 * FRAME_BYTES
            num_frames = job.num_frames
            while job.unread_bytes >= RESUME_BYTES:
                await anext(job)
            assert job.num_frames <= num_frames + 20
            await until(lambda: job.num_frames > num_frames + 20)

    def steps_after_a_while() -> int:
        return engine.num_steps

    engine = FakeEngine(num_frames=ENDLESS)
    run_with(engine, scenario)


def test_the_gate_closes_when_steps_leave_no_time():
    engine = FakeEngine()
    engine.times = StepTimes()
    for rows in range(1, 9):
        engine.times.observe(rows, 0, 0.010 * rows)  # eight listeners need all the time
    gate = StreamGate(engine, max_wait_s=10.0, clock=lambda: 100.0)

    def admitted(num_streams: int) -> bool:
        engine.rows = [
            Row(str(i), 90.0, num_frames=10, due_s=100.1, frames_expected=100.0)
            for i in range(num_streams)
        ]
        return gate.is_open(Request("Again and again."), True)

    assert admitted(0)
    assert admitted(2)
    assert not admitted(8)
    assert 5 < gate.wait_s(0) < 15
    assert gate.wait_s(8) > gate.wait_s(0)
