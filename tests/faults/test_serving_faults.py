"""Faults below the runner, with a real engine; and clients by the thousand, on real sockets."""

import asyncio
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoints import build_tiny
from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine, expected_pcm
from forked_python import python
from live_server import LiveServer, wait_until
from vox_serve.audio import pcm16, wav_file
from vox_serve.engine import Engine, Request
from vox_serve.job import Job, RequestFailed
from vox_serve.loading import load_engine
from vox_serve.runner import Runner
from vox_serve.sampling import SamplingParams
from vox_serve.say import speak

NUM_FRAMES = 6
SEEDS = range(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(seed=5).write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return load_engine(str(folder), max_batch_size=3)


def request(seed: int, num_frames: int = NUM_FRAMES) -> Request:
    return Request(f"Number {seed}.", sampling=SamplingParams(seed=seed), max_frames=num_frames)


@pytest.fixture(scope="module")
def alone(folder) -> list[bytes]:
    """The PCM of each request by itself."""
    engine = load_engine(str(folder))
    return [pcm16(speak(engine, request(seed))[0]).tobytes() for seed in SEEDS]


async def whole(job: Job) -> bytes:
    with job:
        await job.finished()
        return b"".join([chunk async for chunk in job])


def serve(engine: Engine, scenario):
    async def main():
        runner = Runner(engine, max_jobs=64)
        runner.start()
        try:
            return await asyncio.wait_for(scenario(runner), 4 * TIMEOUT_S)
        finally:
            await runner.stop()

    return asyncio.run(main())


def speak_all(engine: Engine, expected: list[bytes], num_recoveries: int) -> None:
    """All requests at once get the audio that they get alone, in spite of a fault."""

    async def scenario(runner):
        jobs = [runner.submit(request(seed), streaming=False) for seed in SEEDS]
        answers = await asyncio.gather(*map(whole, jobs))
        assert runner.counts.recoveries == num_recoveries
        return answers

    assert serve(engine, scenario) == expected


def once_after(num_calls: int, call):
    """`call`, but its call of this index raises."""
    calls = iter(range(10**6))

    def broken(*args, **kwargs):
        if next(calls) == num_calls:
            raise RuntimeError("broken")
        return call(*args, **kwargs)

    return broken


@pytest.mark.parametrize("num_calls", [0, 3])
def test_a_codec_that_fails_costs_nobody_a_sample(num_calls, engine, alone, monkeypatch):
    free = engine._cache.num_free_pages
    broken = once_after(num_calls, engine.mimi.decode_step)
    monkeypatch.setattr(engine.mimi, "decode_step", broken)
    speak_all(engine, alone, num_recoveries=1)
    assert engine._cache.num_free_pages == free


def test_an_exhausted_page_pool_costs_nobody_a_sample(engine, alone, monkeypatch):
    free = engine._cache.num_free_pages
    pool = engine._cache._pool  # a reset replaces it
    monkeypatch.setattr(pool, "_free", [])
    monkeypatch.setattr(pool, "_cached", OrderedDict())
    speak_all(engine, alone, num_recoveries=1)
    assert engine._cache.num_free_pages == free


def test_a_repeated_request_without_a_seed_keeps_its_draws(engine, monkeypatch):
    """The audio before a fault and after it is one utterance's."""
    wanted = Request("Hello.", max_frames=NUM_FRAMES)
    pcm = []
    for num_calls in (10**6, 3):
        with monkeypatch.context() as patch:
            broken = once_after(num_calls, engine.mimi.decode_step)
            patch.setattr(engine.mimi, "decode_step", broken)
            pcm.append(serve(engine, lambda runner: whole(runner.submit(wanted, "", False))))
    assert pcm[0] == pcm[1]


def test_a_stream_is_cut_by_a_fault_and_the_next_one_is_whole(engine, alone, monkeypatch):
    async def scenario(runner):
        with runner.submit(request(0, ENDLESS)) as job:
            await anext(job)
            broken = once_after(0, engine.mimi.decode_step)
            monkeypatch.setattr(engine.mimi, "decode_step", broken)
            with pytest.raises(RequestFailed):
                async for _ in job:
                    pass
        return await whole(runner.submit(request(1)))

    assert serve(engine, scenario) == alone[1]


@pytest.mark.slow
def test_a_thousand_that_leave_a_real_engine_mid_stream_leave_nothing(engine, alone):
    free = engine._cache.num_free_pages

    async def leave(runner, seed: int) -> None:
        with runner.submit(request(seed, 200)) as job:
            for _ in range(1 + seed % 3):
                await anext(job)

    async def scenario(runner):
        for start in range(0, 1000, 50):
            await asyncio.gather(*(leave(runner, start + i) for i in range(50)))
        answers = await asyncio.gather(*(whole(runner.submit(request(seed))) for seed in SEEDS))
        assert (runner._jobs, len(runner._queue), runner.unread_bytes) == ({}, 0, 0)
        return answers

    assert serve(engine, scenario) == alone
    assert engine._cache.num_free_pages == free
    assert not engine.has_work
    assert engine._batch.members == []


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_a_thousand_clients_killed_mid_stream_leave_nothing():
    engine = FakeEngine(num_frames=ENDLESS, max_batch_size=8, step_s=0.001)

    def be_killed(i: int) -> None:
        with server.post_raw(text=f"{i}", streaming=i % 4 > 0, max_frames=2000) as raw:
            if i % 4:
                assert raw.recv(8)

    limits = {"max_queue_size": 64, "max_cancels_per_s": 0}
    with LiveServer(engine, **limits) as server, ThreadPoolExecutor(32) as pool:
        server.post(text="first", max_frames=1).read()
        wait_until(lambda: not server.server.server_state.connections)
        before = num_descriptors()
        list(pool.map(be_killed, range(1000)))
        wait_until(lambda: not server.runner._jobs and not engine.has_work)
        wait_until(lambda: not server.server.server_state.connections)
        assert not server.server.server_state.tasks
        assert num_descriptors() <= before
        answer = server.post(text="next", max_frames=2).read()
        assert answer == wav_file(expected_pcm("next", 2, cut=True))


def test_ten_times_too_many_clients_are_all_answered():
    engine = FakeEngine(num_frames=4, max_batch_size=2, step_s=0.02)

    def ask(i: int) -> int:
        answer = server.post(text=f"{i}", streaming=i % 2 == 0)
        body = answer.read()
        if answer.status == 200:
            assert body[44:] == expected_pcm(f"{i}", 4)
        else:
            assert int(answer.getheader("retry-after")) >= 1
        return answer.status

    with LiveServer(engine, max_queue_size=6) as server, ThreadPoolExecutor(80) as pool:
        statuses = list(pool.map(ask, range(80)))
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 8
        assert server.runner.counts.refused == statuses.count(429)


@pytest.mark.slow
def test_clients_that_never_read_hold_no_places():
    engine = FakeEngine(num_frames=500, max_batch_size=4)
    with LiveServer(engine, max_queue_size=4) as server:
        silent: list[socket.socket] = []
        for i in range(12):
            silent.append(server.post_raw(text=f"{i}", streaming=i % 2 == 0, max_frames=500))
            wait_until(lambda: sum(server.runner.counts.finished.values()) == len(silent))
        # The counts are the engine thread's; the event loop learns of the last end a moment later.
        wait_until(lambda: server.runner.count_jobs() == (0, 0))
        answer = server.post(text="next", max_frames=2).read()
        assert answer == wav_file(expected_pcm("next", 2, cut=True))
        for raw in silent:
            raw.close()
        wait_until(lambda: not server.runner._jobs)
        assert server.runner.unread_bytes == 0


FORK = """
import os, signal, sys
import vox_serve

voice = vox_serve.load(sys.argv[1], num_threads=2)
before = voice.say("Hello.", seed=1, max_frames=3)
child = os.fork()
if not child:
    signal.alarm(20)
same = (voice.say("Hello.", seed=1, max_frames=3) == before).all()
if not child:
    os._exit(0 if same else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or (0 if same else 4))
"""


@pytest.mark.slow
def test_a_forked_process_and_its_parent_speak_on(folder):
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "VOX_SERVE_DEVICE": "cpu"}
    command = [*python(), "-c", FORK, str(folder)]
    assert subprocess.run(command, env=environment, timeout=4 * TIMEOUT_S).returncode == 0
