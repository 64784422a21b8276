import asyncio
import threading

import numpy as np
import pytest

from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine, expected_pcm, fake_audio
from runner_testing import read_job, run_with
from vox_serve.engine import Request
from vox_serve.long_form import LongForm
from vox_serve.part_feed import PartFeed
from vox_serve.runner import EngineFailure, QueueFull, RequestFailed, RequestRefused, Runner
from vox_serve.sampling import SamplingParams


async def read(runner: Runner, request: Request) -> bytes:
    return await read_job(runner.submit(request))


async def until_aborted(engine: FakeEngine) -> None:
    assert await asyncio.to_thread(engine.saw_abort.wait, TIMEOUT_S)


@pytest.mark.parametrize("num_frames", [0, 1, 5])
def test_a_job_yields_its_frames(num_frames):
    async def scenario(runner):
        with runner.submit(Request("hello")) as job:
            chunks = [chunk async for chunk in job]
            assert [chunk async for chunk in job] == []  # ended stays ended
        return chunks

    chunks = run_with(FakeEngine(num_frames), scenario)
    assert [len(chunk) for chunk in chunks] == [3840] * num_frames
    assert b"".join(chunks) == expected_pcm("hello", num_frames)


def test_the_last_frame_and_the_end_may_come_together():
    request = Request("hello", max_frames=2)
    pcm = run_with(FakeEngine(num_frames=9), lambda runner: read(runner, request))
    assert pcm == expected_pcm("hello", 2, cut=True)


def test_jobs_do_not_mix():
    requests = [Request(f"text {i}", sampling=SamplingParams(seed=i)) for i in range(7)]

    async def scenario(runner):
        return await asyncio.gather(*(read(runner, request) for request in requests))

    answers = run_with(FakeEngine(num_frames=4, max_batch_size=3), scenario)
    assert answers == [expected_pcm(f"text {i}", 4, seed=i) for i in range(7)]


def test_leaving_a_job_aborts_it_and_frees_its_place():
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.001)

    async def scenario(runner):
        with runner.submit(Request("one", id="one")) as job:
            await anext(job)
            assert runner.count_jobs() == (1, 0)
            with pytest.raises(QueueFull, match="1 requests"):
                runner.submit(Request("two"))
        assert runner.count_jobs() == (0, 0)
        await until_aborted(engine)
        return await read(runner, Request("three", max_frames=1))

    assert run_with(engine, scenario, max_jobs=1) == expected_pcm("three", 1, cut=True)
    assert engine.aborted == ["one"]


def test_a_cancelled_reader_aborts():
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.001)

    async def scenario(runner):
        reader = asyncio.create_task(read(runner, Request("one", id="one")))
        while runner.count_jobs() != (1, 0):
            await asyncio.sleep(0)
        reader.cancel()
        await until_aborted(engine)

    run_with(engine, scenario)
    assert engine.aborted == ["one"]


def test_a_job_left_before_the_engine_saw_it_is_never_added():
    engine = FakeEngine()

    async def scenario(runner):
        with runner.submit(Request("left")):
            pass
        await read(runner, Request("read"))

    async def main():
        runner = Runner(engine, 8)
        with runner.submit(Request("left")):  # the thread does not run yet
            pass
        runner.start()
        assert await read(runner, Request("read")) == expected_pcm("read", 3)
        await runner.stop()

    asyncio.run(main())
    assert [request.text for request in engine.requests] == ["read"]


def test_a_finished_job_is_not_aborted():
    engine = FakeEngine()
    run_with(engine, lambda runner: read(runner, Request("hello")))
    assert engine.aborted == []


def test_a_refused_request_harms_no_other():
    async def scenario(runner):
        with pytest.raises(RequestRefused, match="takes 5000 of 2000"):
            await read(runner, Request("x" * 5000))
        with pytest.raises(RequestFailed, match="internal error") as failed:
            await read(runner, Request("crash"))
        assert "a bug in add" not in str(failed.value)
        assert runner.failure is None
        assert runner.count_jobs() == (0, 0)
        return await read(runner, Request("fine"))

    assert run_with(FakeEngine(), scenario) == expected_pcm("fine", 3)


def test_an_engine_that_breaks_cuts_its_streams_and_goes_on():
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.001)

    async def scenario(runner):
        jobs = [runner.submit(Request(text)) for text in "ab"]
        for job in jobs:
            await anext(job)
        engine.fail_at_step = engine.num_steps + 20
        results = await asyncio.gather(*map(read_job, jobs), return_exceptions=True)
        assert [type(result) for result in results] == [RequestFailed] * 2
        assert "the fake engine broke" not in str(results[0])
        assert runner.failure is None
        assert (runner.counts.failed, runner.counts.recoveries) == (2, 1)
        return await read(runner, Request("later", max_frames=2))

    assert run_with(engine, scenario) == expected_pcm("later", 2, cut=True)
    assert engine.num_resets == 1


def test_stopping_ends_live_jobs():
    async def scenario(runner):
        reader = asyncio.create_task(read(runner, Request("one")))
        while runner.count_jobs() != (1, 0):
            await asyncio.sleep(0)
        await runner.stop()
        with pytest.raises(EngineFailure, match="shutting down"):
            await reader

    before = threading.active_count()
    run_with(FakeEngine(num_frames=ENDLESS, step_s=0.001), scenario)
    assert threading.active_count() == before


def test_an_unread_job_stalls_no_other():
    async def scenario(runner):
        with runner.submit(Request("unread", max_frames=50)) as unread:
            answers = [await read(runner, Request(f"{i}", max_frames=2)) for i in range(30)]
            kept = b"".join([chunk async for chunk in unread])
        return answers, kept

    answers, kept = run_with(FakeEngine(num_frames=ENDLESS), scenario)
    assert answers == [expected_pcm(f"{i}", 2, cut=True) for i in range(30)]
    assert kept == expected_pcm("unread", 50, cut=True)


def test_a_text_that_is_being_tokenized_stalls_no_live_request():
    """A live request keeps its frame per millisecond while texts take half a second each."""
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.001)

    async def scenario(runner):
        with runner.submit(Request("live")) as live:
            await anext(live)
            engine.prepare_s = 0.5
            jobs = [runner.submit(Request(f"{i}", max_frames=1)) for i in range(2)]
            await anext(jobs[1])
            for job in jobs:
                job.close()
            return live.num_frames

    assert run_with(engine, scenario) > 50


def test_chunks_are_little_endian_pcm():
    pcm = run_with(FakeEngine(1), lambda runner: read(runner, Request("hello")))
    samples = np.frombuffer(pcm, "<i2") / 32768
    np.testing.assert_allclose(samples, fake_audio("hello", None, 0), atol=2**-15)


def test_a_suspect_that_waits_for_text_holds_up_no_other():
    """After two failed steps it would run alone to its end."""
    engine = FakeEngine()

    def fault() -> None:
        if engine.num_steps <= 2:
            raise RuntimeError("the fake engine broke")

    engine.fault = fault
    feed = PartFeed("First.")

    async def scenario(runner):
        job = runner.submit(Request("First.", feed=feed), "a")
        other = runner.submit(Request("Other.", max_frames=2), "b")
        while not all(share.ready for share in runner._queue._shares.values()):
            await asyncio.sleep(0.002)
        runner.start()
        assert len(await read_job(other)) == 2 * 3840
        assert feed.is_open
        feed.close()
        runner.resume()
        assert len(await read_job(job)) == 3 * 3840

    run_with(LongForm(engine, 40), scenario, started=False)
    assert engine.num_resets == 2


def prefill_later(runner: Runner, key: str, text: str = "context") -> None:
    runner.prefill_later(
        "client", key, lambda: runner.engine.prepare(Request(text)), is_wanted=lambda: True
    )


@pytest.mark.parametrize("num_contexts", [1, 5])
def test_contexts_are_prefilled_while_there_is_no_request(num_contexts):
    engine = FakeEngine()
    steps = threading.Semaphore(0)
    engine.idle_prefill.on_step = steps.release

    async def scenario(runner):
        for number in range(num_contexts):
            prefill_later(runner, str(number))
        for _ in range(num_contexts):
            assert await asyncio.to_thread(steps.acquire, timeout=TIMEOUT_S)
        return await read(runner, Request("hello"))

    assert run_with(engine, scenario) == expected_pcm("hello", 3)
    assert engine.idle_prefill.done == [str(number) for number in range(num_contexts)]


def test_a_context_waits_while_a_request_waits_for_its_reader():
    engine = FakeEngine(num_frames=ENDLESS)

    async def scenario(runner):
        with runner.submit(Request("long")) as job:
            while not job.is_ahead:
                await asyncio.sleep(0.001)
            prefill_later(runner, "a")
            num_steps = engine.num_steps
            await asyncio.sleep(0.05)
            assert engine.num_steps <= num_steps + 1
            assert engine.idle_prefill.done == []

    run_with(engine, scenario)


def test_a_context_that_cannot_be_prefilled_harms_no_request(caplog):
    engine = FakeEngine()
    has_failed = threading.Event()

    def fail() -> None:
        has_failed.set()
        raise RuntimeError("a kernel refused its arguments")

    engine.idle_prefill.on_step = fail

    async def scenario(runner):
        prefill_later(runner, "too long to build", "x" * 3000)
        prefill_later(runner, "b")
        assert await asyncio.to_thread(has_failed.wait, TIMEOUT_S)
        return await read(runner, Request("hello"))

    assert run_with(engine, scenario) == expected_pcm("hello", 3)
    assert engine.num_resets == 0
    assert engine.idle_prefill.done == ["b"]
    assert caplog.text.count("a context cannot be prefilled") == 2


def test_a_device_that_failed_while_idle_ends_the_server():
    engine = FakeEngine()

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine.idle_prefill.on_step = fail

    async def scenario(runner):
        has_failed = threading.Event()
        runner.on_failure = has_failed.set
        prefill_later(runner, "a")
        assert await asyncio.to_thread(has_failed.wait, TIMEOUT_S)
        with pytest.raises(EngineFailure):
            runner.submit(Request("hello"))

    run_with(engine, scenario)
