"""Faults of the engine, of readers and of texts, and the requests beside them."""

import asyncio
import gc
import itertools
import threading
import time

import pytest
import torch

from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine, expected_pcm
from runner_testing import read_job, run_with
from vox_serve.engine import Request
from vox_serve.engine_thread import MAX_FRUITLESS_FAILURES
from vox_serve.job import (
    EngineFailure,
    Job,
    QueueFull,
    ReaderStalled,
    RequestFailed,
    ShuttingDown,
)
from vox_serve.runner import EXIT_ENGINE_FAILED, Runner

FRAME_BYTES = 3840


async def whole(job: Job) -> bytes:
    with job:
        await job.finished()
        return b"".join([chunk async for chunk in job])


async def until(holds) -> None:
    while not holds():
        await asyncio.sleep(0.001)


async def run_together(runner: Runner, jobs: list[Job]) -> list[bytes | Exception]:
    """Start the runner when all jobs are ready, so that they share the first step."""
    await until(lambda: not runner._preparing.is_busy)
    runner.start()
    reads = [read_job(job) if job.streaming else whole(job) for job in jobs]
    return await asyncio.gather(*reads, return_exceptions=True)


def submit_whole(runner: Runner, text: str, **fields) -> Job:
    return runner.submit(Request(text, **fields), streaming=False)


class TestFailedSteps:
    def test_whole_answers_are_repeated_and_streams_are_cut(self):
        engine = FakeEngine(num_frames=6, max_batch_size=4, fail_at_step=4)

        async def scenario(runner):
            jobs = [submit_whole(runner, "a"), submit_whole(runner, "b"),
                    runner.submit(Request("c")), submit_whole(runner, "d")]  # fmt: skip
            return await run_together(runner, jobs)

        a, b, cut, d = run_with(engine, scenario, started=False)
        assert [a, b, d] == [expected_pcm(text, 6) for text in "abd"]
        assert isinstance(cut, RequestFailed)

    def test_the_request_that_breaks_the_engine_is_refused_and_no_other(self):
        engine = FakeEngine(num_frames=3, max_batch_size=4)

        async def scenario(runner):
            jobs = [submit_whole(runner, text) for text in ("a", "poison", "b", "c", "d", "e")]
            results = await run_together(runner, jobs)
            assert runner.failure is None
            assert runner.counts.failed == 1
            assert runner.counts.finished == {"stop": 5}
            return results

        a, poisoned, *others = run_with(engine, scenario, started=False)
        assert [a, *others] == [expected_pcm(text, 3) for text in "abcde"]
        assert isinstance(poisoned, RequestFailed)
        assert "broke" not in str(poisoned)
        assert sum(request.text == "poison" for request in engine.requests) == 3

    def test_streams_with_nothing_sent_are_repeated(self):
        engine = FakeEngine(num_frames=3, max_batch_size=4)

        async def scenario(runner):
            jobs = [runner.submit(Request(text)) for text in ("a", "poison", "b")]
            return await run_together(runner, jobs)

        a, poisoned, b = run_with(engine, scenario, started=False)
        assert [a, b] == [expected_pcm("a", 3), expected_pcm("b", 3)]
        assert isinstance(poisoned, RequestFailed)

    def test_a_request_that_breaks_the_engine_late_is_found_too(self):
        engine = FakeEngine(num_frames=5, max_batch_size=4)

        async def scenario(runner):
            jobs = [submit_whole(runner, text) for text in ("a", "late poison", "b", "c")]
            return await run_together(runner, jobs)

        a, poisoned, b, c = run_with(engine, scenario, started=False)
        assert [a, b, c] == [expected_pcm(text, 5) for text in "abc"]
        assert isinstance(poisoned, RequestFailed)

    def test_suspects_run_alone(self):
        engine = FakeEngine(num_frames=2, max_batch_size=4)
        open_at_steps = []
        engine.fault = lambda: open_at_steps.append(
            sorted(r.text for r, _ in engine._open.values())
        )

        async def scenario(runner):
            jobs = [submit_whole(runner, text) for text in ("a", "poison", "b")]
            await run_together(runner, jobs)

        run_with(engine, scenario, started=False)
        first = next(i for i, texts in enumerate(open_at_steps) if "poison" in texts)
        last = max(i for i, texts in enumerate(open_at_steps) if "poison" in texts)
        assert all(len(texts) == 1 for texts in open_at_steps[first + 1 : last + 1])

    def test_a_suspect_that_leaves_delays_nobody(self):
        engine = FakeEngine(num_frames=ENDLESS, max_batch_size=2)
        has_left = threading.Event()

        def fault() -> None:
            has_left.wait(TIMEOUT_S)
            engine.fault = lambda: None
            broken()

        engine.fault = fault

        async def scenario(runner):
            gone, stays = submit_whole(runner, "gone"), submit_whole(runner, "stays", max_frames=3)
            await until(lambda: not runner._preparing.is_busy)
            runner.start()
            await until(lambda: len(engine._open) == 2)
            gone.close()
            has_left.set()
            return await whole(stays)

        pcm = run_with(engine, scenario, started=False)
        assert pcm == expected_pcm("stays", 3, cut=True)

    def test_a_request_whose_audio_is_not_finite_fails_alone(self):
        async def scenario(runner):
            jobs = [runner.submit(Request("nan")), runner.submit(Request("a"))]
            results = await run_together(runner, jobs)
            assert (runner.counts.failed, runner.counts.non_finite) == (1, 1)
            assert jobs[0].finish_reason == "error"
            assert jobs[1].finish_reason == "stop"
            return results

        failed, other = run_with(FakeEngine(num_frames=4), scenario, started=False)
        assert isinstance(failed, RequestFailed)
        assert str(failed) == "the audio is not finite"
        assert other == expected_pcm("a", 4)

    def test_waiting_requests_outlive_a_failure(self):
        engine = FakeEngine(num_frames=2, max_batch_size=1, step_s=0.001, fail_at_step=2)

        async def scenario(runner):
            jobs = [runner.submit(Request(text)) for text in "abcd"]
            return await run_together(runner, jobs)

        first, *others = run_with(engine, scenario, started=False)
        assert isinstance(first, RequestFailed)
        assert others == [expected_pcm(text, 2) for text in "bcd"]

    @pytest.mark.parametrize(
        "error", [RuntimeError("CUDA error: an illegal memory access"), torch.AcceleratorError("x")]
    )
    def test_a_poisoned_device_ends_the_server(self, error):
        engine = FakeEngine(num_frames=ENDLESS, max_batch_size=1, step_s=0.001)

        async def scenario(runner):
            ended = threading.Event()
            runner.on_failure = ended.set
            jobs = [submit_whole(runner, text) for text in "ab"]
            await until(lambda: engine.num_steps)

            def fault():
                raise error

            engine.fault = fault
            results = await asyncio.gather(*map(whole, jobs), return_exceptions=True)
            assert [type(result) for result in results] == [EngineFailure] * 2
            assert str(results[0]) == runner.failure == "the engine failed"
            assert runner.exit_code == EXIT_ENGINE_FAILED
            assert ended.wait(TIMEOUT_S)
            with pytest.raises(EngineFailure):
                runner.submit(Request("later"))

        run_with(engine, scenario)
        assert engine.num_resets == 0

    def test_an_engine_that_never_works_again_ends_the_server(self):
        engine = FakeEngine()
        engine.fault = broken

        async def scenario(runner):
            while runner.failure is None:
                with pytest.raises((RequestFailed, EngineFailure)):
                    await whole(submit_whole(runner, "a"))
            assert runner.exit_code == EXIT_ENGINE_FAILED

        run_with(engine, scenario)
        assert engine.num_resets == MAX_FRUITLESS_FAILURES


def broken() -> None:
    raise RuntimeError("the fake engine broke")


class TestReaders:
    def test_a_spoken_but_unread_request_holds_no_place(self):
        async def scenario(runner):
            unread = []
            for i in range(4):
                unread.append(runner.submit(Request(f"u{i}")))
                await until(lambda: unread[-1].ended)
            assert runner.count_jobs() == (0, 0)
            answers = [await read_job(runner.submit(Request(f"{i}"))) for i in range(4)]
            assert runner.unread_bytes == 4 * 3 * FRAME_BYTES
            assert [await read_job(job) for job in unread] == [
                expected_pcm(f"u{i}", 3) for i in range(4)
            ]
            assert runner.unread_bytes == 0
            return answers

        assert run_with(FakeEngine(), scenario, max_jobs=2) == [
            expected_pcm(f"{i}", 3) for i in range(4)
        ]

    @pytest.mark.parametrize("streaming", [True, False])
    def test_a_stalled_reader_is_dropped(self, streaming):
        async def scenario(runner):
            job = runner.submit(Request("stalled"), streaming=streaming)
            await until(lambda: runner.counts.stalled == 1)
            with pytest.raises(ReaderStalled, match=r"took nothing for 0\.05 s"):
                await anext(job)
            assert runner.unread_bytes == 0
            assert runner._jobs == {}

        run_with(FakeEngine(), scenario, stall_timeout_s=0.05)

    def test_a_stalled_reader_of_a_live_stream_is_aborted(self):
        engine = FakeEngine(num_frames=ENDLESS, step_s=0.001)

        async def scenario(runner):
            runner.submit(Request("stalled"))
            await until(lambda: engine.aborted)
            assert runner.count_jobs() == (0, 0)

        run_with(engine, scenario, stall_timeout_s=0.05)

    def test_a_slow_reader_is_not_dropped(self):
        async def scenario(runner):
            with runner.submit(Request("slow")) as job:
                chunks = []
                async for chunk in job:
                    chunks.append(chunk)
                    await asyncio.sleep(0.1)
            assert runner.counts.stalled == 0
            return b"".join(chunks)

        pcm = run_with(FakeEngine(num_frames=8), scenario, stall_timeout_s=0.4)
        assert pcm == expected_pcm("slow", 8)

    def test_a_whole_answer_in_the_making_is_not_stalled(self):
        engine = FakeEngine(num_frames=20, step_s=0.01)

        async def scenario(runner):
            return await whole(submit_whole(runner, "long"))

        assert run_with(engine, scenario, stall_timeout_s=0.05) == expected_pcm("long", 20)

    def test_unread_audio_is_bounded_and_the_largest_holder_pays(self):
        async def scenario(runner):
            small = runner.submit(Request("small", max_frames=2), client="reads little")
            large = runner.submit(Request("large", max_frames=6), client="reads nothing")
            await until(lambda: small.ended and large.ended)
            largest = runner.submit(Request("largest", max_frames=9), client="reads nothing")
            await until(lambda: runner.counts.stalled)
            assert await read_job(small) == expected_pcm("small", 2, cut=True)
            assert await read_job(runner.submit(Request("next"))) == expected_pcm("next", 9)
            dropped = [job for job in (large, largest) if job.closed]
            with pytest.raises(ReaderStalled, match="of audio unread"):
                await anext(dropped[0])

        run_with(FakeEngine(num_frames=9), scenario, max_unread_bytes=13 * FRAME_BYTES)

    def test_a_whole_answer_without_room_is_refused_not_failed(self):
        async def scenario(runner):
            with pytest.raises(QueueFull, match="audio waits") as refused:
                await whole(submit_whole(runner, "long"))
            assert refused.value.retry_after_s >= 1
            assert (runner.counts.refused, runner.counts.stalled) == (1, 0)
            following = runner.submit(Request("next", max_frames=3))
            assert await read_job(following) == expected_pcm("next", 3, cut=True)
            assert runner.unread_bytes == 0

        run_with(FakeEngine(num_frames=9), scenario, max_unread_bytes=5 * FRAME_BYTES)


class TestOrder:
    def test_a_client_that_speaks_nothing_yet_is_urgent_among_the_many_of_another(self):
        engine = FakeEngine(num_frames=ENDLESS, max_batch_size=4)

        async def scenario(runner):
            jobs = [runner.submit(Request(f"a{i}"), client="a") for i in range(3)]
            await until(lambda: len(engine.requests) == 3)
            jobs.append(runner.submit(Request("b"), client="b"))
            await until(lambda: len(engine.requests) == 4)
            for job in jobs:
                job.close()

        run_with(engine, scenario)
        urgent = [request.urgent for request in engine.requests]
        assert urgent == [True, False, False, True]


class TestPreparation:
    def test_a_text_that_takes_for_ever_delays_no_other(self):
        engine = FakeEngine()
        hanging, prepare = threading.Event(), engine.prepare

        def hang(request):
            if request.text.startswith("hang"):
                hanging.wait(TIMEOUT_S)
            return prepare(request)

        engine.prepare = hang

        async def scenario(runner):
            hung = [runner.submit(Request(f"hang{i}")) for i in range(30)]
            answer = await read_job(runner.submit(Request("quick")))
            for job in hung:
                job.close()
            return answer

        try:
            start = time.monotonic()
            assert run_with(engine, scenario, max_jobs=31) == expected_pcm("quick", 3)
            assert time.monotonic() - start < TIMEOUT_S / 3  # the stop did not wait either
        finally:
            hanging.set()

    def test_slow_texts_of_clients_that_left_delay_no_other(self):
        engine = FakeEngine()
        hanging, prepare = threading.Event(), engine.prepare
        seen = []

        def hang(request):
            seen.append(request.text)
            if len(request.text) > 1000:
                hanging.wait(TIMEOUT_S)
            return prepare(request)

        engine.prepare = hang

        async def scenario(runner):
            for _ in range(200):
                runner.submit(Request("1" * 1500)).close()
            answer = await read_job(runner.submit(Request("quick")))
            hanging.set()
            await until(lambda: not runner._preparing.is_busy)
            return answer

        assert run_with(engine, scenario) == expected_pcm("quick", 3)
        assert len(seen) <= 17  # those that had left were skipped

    def test_no_threads_left_is_overload(self, monkeypatch):
        async def scenario(runner):
            def refuse(thread):
                raise RuntimeError("can't start new thread")

            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                with pytest.raises(QueueFull):
                    runner.submit(Request("a"))
            assert runner.count_jobs() == (0, 0)
            return await read_job(runner.submit(Request("b")))

        assert run_with(FakeEngine(), scenario) == expected_pcm("b", 3)


class TestOverload:
    def test_ten_times_too_many_are_all_answered(self):
        engine = FakeEngine(num_frames=3, max_batch_size=2)
        all_came = threading.Event()
        engine.fault = lambda: all_came.wait(TIMEOUT_S) and None

        async def client(runner, name: str, i: int) -> bytes:
            return await read_job(runner.submit(Request(f"{name}{i}"), client=name))

        async def scenario(runner):
            clients = [client(runner, "flood", i) for i in range(80)]
            clients.append(client(runner, "polite", 0))
            tasks = [asyncio.ensure_future(c) for c in clients]
            await until(lambda: runner.counts.refused == 73)
            all_came.set()
            *answers, polite = await asyncio.gather(*tasks, return_exceptions=True)
            assert polite == expected_pcm("polite0", 3)
            spoken = {i: pcm for i, pcm in enumerate(answers) if isinstance(pcm, bytes)}
            # The last one of the first eight made room for the polite client.
            assert spoken == {i: expected_pcm(f"flood{i}", 3) for i in range(7)}
            refused = [answer for answer in answers if isinstance(answer, QueueFull)]
            assert len(refused) == 73
            assert min(full.retry_after_s for full in refused) >= 1
            assert engine.most_open == 2

        run_with(engine, scenario, max_jobs=8)

    def test_a_flood_delays_another_client_by_one_turn(self):
        engine = FakeEngine(num_frames=3, max_batch_size=1)
        all_came = threading.Event()
        engine.fault = lambda: all_came.wait(TIMEOUT_S) and None

        async def scenario(runner):
            jobs = [runner.submit(Request(f"f{i}"), client="flood") for i in range(20)]
            await until(lambda: engine.requests)
            jobs.append(runner.submit(Request("polite"), client="polite"))
            await until(lambda: not runner._preparing.is_busy)
            all_came.set()
            await asyncio.gather(*map(read_job, jobs))

        run_with(engine, scenario, max_jobs=99)
        assert [request.text for request in engine.requests].index("polite") == 1

    def test_retry_after_follows_the_measured_speed(self):
        engine = FakeEngine(num_frames=1, max_batch_size=1, step_s=0.0)

        async def scenario(runner):
            runner._durations_s.clear()
            runner._durations_s.extend([3.0, 4.0, 90.0])
            engine.num_frames = ENDLESS
            jobs = [runner.submit(Request(f"{i}")) for i in range(3)]
            await until(lambda: engine.requests)
            with pytest.raises(QueueFull) as full:
                runner.submit(Request("one more"))
            for job in jobs:
                job.close()
            return full.value.retry_after_s

        assert run_with(engine, scenario, max_jobs=3) == 12  # three turns of 4 s


class TestLeaving:
    def test_computation_stops_within_two_frames(self):
        engine = FakeEngine(num_frames=ENDLESS, step_s=0.001)

        async def scenario(runner):
            job = runner.submit(Request("left"))
            await anext(job)
            job.close()
            at_close = engine.num_steps
            await until(lambda: engine.aborted)
            assert engine.num_steps - at_close <= 2
            await asyncio.sleep(0.02)
            assert engine.num_steps - at_close <= 2

        run_with(engine, scenario)

    @pytest.mark.slow
    def test_a_thousand_that_leave_mid_stream_leave_nothing(self):
        engine = FakeEngine(num_frames=ENDLESS, max_batch_size=8)

        async def leave(runner, i: int) -> None:
            with runner.submit(Request(f"{i}")) as job:
                await anext(job)

        async def scenario(runner):
            for _ in range(20):
                await asyncio.gather(*(leave(runner, i) for i in range(50)))
            await until(lambda: not engine.has_work)
            assert len(engine.aborted) == 1000
            assert (runner._jobs, len(runner._queue), runner.unread_bytes) == ({}, 0, 0)
            assert runner._thread._running == {}
            assert len(asyncio.all_tasks()) <= 2
            await until(lambda: not runner._preparing.is_busy)

        run_with(engine, scenario, max_jobs=64)
        gc.collect()
        assert not [item for item in gc.get_objects() if type(item) is Job]


class TestDrain:
    def test_what_is_spoken_ends_and_what_waits_is_refused(self):
        engine = FakeEngine(num_frames=20, max_batch_size=1, step_s=0.01)

        async def scenario(runner):
            live = runner.submit(Request("live"))
            first = await anext(live)
            waiting = submit_whole(runner, "waiting")
            draining = asyncio.create_task(runner.drain(TIMEOUT_S))
            with pytest.raises(ShuttingDown) as refused:
                await whole(waiting)
            assert refused.value.retry_after_s >= 1
            with pytest.raises(ShuttingDown):
                runner.submit(Request("new"))
            assert not draining.done()
            rest = await read_job(live)
            await draining
            return first + rest

        assert run_with(engine, scenario) == expected_pcm("live", 20)

    def test_the_rest_is_cut_when_time_is_over(self):
        engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)

        async def scenario(runner):
            live = runner.submit(Request("live"))
            await anext(live)
            await runner.drain(0.05)
            assert runner.failure is None
            runner.request_stop()
            with pytest.raises(ShuttingDown):
                await read_job(live)

        run_with(engine, scenario)

    def test_an_idle_server_drains_at_once(self):
        async def scenario(runner):
            await runner.drain(TIMEOUT_S)

        start = time.monotonic()
        run_with(FakeEngine(), scenario)
        assert time.monotonic() - start < TIMEOUT_S / 3


def test_a_clock_that_jumps_changes_nothing(monkeypatch):
    jumps = itertools.cycle([0.0, 2e9, -1e6, 4e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))

    async def scenario(runner):
        stalled, answer = runner.submit(Request("stalled")), runner.submit(Request("a"))
        pcm = await read_job(answer)
        assert runner.counts.stalled == 0
        await until(lambda: runner.counts.stalled == 1)
        assert stalled.closed
        assert max(runner._durations_s) < TIMEOUT_S
        await runner.drain(TIMEOUT_S)
        return pcm

    assert run_with(FakeEngine(), scenario, stall_timeout_s=1.0) == expected_pcm("a", 3)
