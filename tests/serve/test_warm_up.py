"""Trial steps at the start: they teach the times of steps, and leave no other trace."""

import asyncio
import itertools
import threading

import pytest
import torch
from fastapi.testclient import TestClient

from checkpoints import TinyShape, build_tiny
from engine_testing import random_context, run
from fake_engine import TIMEOUT_S, FakeEngine, expected_pcm
from process_server import ProcessServer
from runner_testing import read_job, run_with
from vox_serve.api import create_app
from vox_serve.config import Config
from vox_serve.engine import Engine, Request
from vox_serve.loading import load_engine
from vox_serve.policy import choose_step
from vox_serve.runner import Runner
from vox_serve.sampling import SamplingParams
from vox_serve.warm_up import warm_up

LONG_S = 60.0


@pytest.fixture(scope="module", params=[None, 0], ids=["speaks on", "ends at once"])
def loaded(tmp_path_factory, request) -> Engine:
    torch.manual_seed(0)
    tiny = build_tiny(TinyShape(), seed=3, stop_frame=request.param)
    return load_engine(str(tiny.write(tmp_path_factory.mktemp("checkpoint"))))


def make(loaded: Engine, **options) -> Engine:
    options = {"max_batch_size": 5, "prefix_cache_bytes": 2**20, **options}
    torch.manual_seed(1)
    return Engine(
        loaded.model,
        loaded.mimi,
        loaded.prompts,
        default_context=random_context(TinyShape()),
        num_spare_rows=1,
        choose=choose_step,
        **options,
    )


def spoken(engine: Engine) -> list[torch.Tensor]:
    requests = [
        Request(text, sampling=SamplingParams(seed=n), max_frames=9)
        for n, text in enumerate(["Hello.", "0: the quick brown fox.", "1: the quick"])
    ]
    found = run(engine, *requests)
    return [found[request.id][0] for request in requests]


def test_no_trace_but_the_times_of_steps(loaded):
    fresh, warm = make(loaded), make(loaded)
    lengths, choose = warm.lengths, warm.choose
    sizes = warm_up(warm, LONG_S)
    assert not warm.has_work
    assert warm.rows == []
    assert warm.cache_counts() == fresh.cache_counts()
    assert (warm.lengths, warm.choose) == (lengths, choose)
    assert lengths.expected(100.0) == fresh.lengths.expected(100.0)
    assert (warm.times.slow, warm.times.prompt_s, warm.times.lately) == (1.0, 0.0, 1.0)
    for mine, expected in zip(spoken(warm), spoken(fresh), strict=True):
        assert torch.equal(mine, expected)
    assert warm.cache_counts() == fresh.cache_counts()
    if sizes[-1] > 0:  # they went on speaking
        assert sizes == [1, 2, 4, 6]
        assert all(warm.times.knows(rows) for rows in sizes)
        assert warm.times.summary()["prompt_tokens"]


class Clock:
    """Each look takes 10 ms."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.01
        return self.now_s


@pytest.mark.parametrize("before", ["a warm-up", "a request that was given up"])
def test_the_pause_until_the_next_request_is_no_step(before, loaded):
    clock = Clock()
    engine = make(loaded, clock=clock)
    if before == "a warm-up":
        warm_up(engine, LONG_S, clock)
    else:
        engine.add(request := Request("Hello.", max_frames=9))
        engine.step()
        engine.abort(request.id)
    clock.now_s += 1000
    spoken(engine)
    summary = engine.times.summary()
    assert max({**summary["rows"], **summary["prompt_tokens"]}.values()) < 1000


def test_long_steps_end_the_warm_up(loaded):
    seconds = itertools.count()
    engine = make(loaded)
    assert len(warm_up(engine, 0.0, clock=lambda: float(next(seconds)))) == 1
    assert not engine.has_work
    assert engine.num_prompt_positions == 0


def test_few_pages_are_enough(loaded):
    pages = make(loaded)._cache
    one = pages.pages_per_sequence * (pages.k_pages[:, 0].nbytes + pages.v_pages[:, 0].nbytes)
    engine = make(loaded, max_batch_size=40, kv_cache_bytes=one)
    warm_up(engine, LONG_S)
    assert not engine.has_work
    fresh = make(loaded, max_batch_size=40, kv_cache_bytes=one)
    for mine, expected in zip(spoken(engine), spoken(fresh), strict=True):
        assert torch.equal(mine, expected)


def test_requests_wait_for_the_warm_up():
    engine, may_end = FakeEngine(), threading.Event()

    async def scenario(runner):
        runner.warm_up = lambda: may_end.wait(TIMEOUT_S)
        runner.start()
        assert runner.status == ("warming", "the server is warming up")
        job = runner.submit(Request("hello"))
        assert engine.requests == []
        may_end.set()
        pcm = await read_job(job)
        assert runner.status == ("ok", None)
        return pcm

    assert run_with(engine, scenario, started=False) == expected_pcm("hello", 3)


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_a_server_is_ready_after_its_warm_up(path):
    config, engine, may_end = Config(), FakeEngine(), threading.Event()
    runner = Runner.for_config(engine, config)
    runner.warm_up = lambda: may_end.wait(TIMEOUT_S)
    with TestClient(create_app(runner, config, {})) as client:
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.json()["reason"] == "the server is warming up"
        assert client.get("/health/live").status_code == 200
        may_end.set()
        assert runner.is_warm.wait(TIMEOUT_S)
        assert client.get(path).status_code == 200


def test_a_warm_up_that_fails_is_left_out(caplog):
    engine = FakeEngine()

    def fail():
        raise RuntimeError("no memory")

    async def scenario(runner):
        runner.warm_up = fail
        runner.start()
        assert await asyncio.to_thread(runner.is_warm.wait, TIMEOUT_S)
        return await read_job(runner.submit(Request("hello")))

    assert run_with(engine, scenario, started=False) == expected_pcm("hello", 3)
    assert engine.num_resets == 1
    assert "the warm-up failed" in caplog.text


@pytest.mark.parametrize(("flags", "is_warm"), [([], True), (["--warm_up_s=0"], False)])
def test_the_command_says_ready_when_it_is_warm(flags, is_warm, tmp_path):
    seen = tmp_path / "seen"
    after = "import pathlib, time\n"
    after += f"engine.warm_up = lambda s: (time.sleep(0.2), pathlib.Path({str(seen)!r}).touch())"
    with ProcessServer(tmp_path / "log", after=after, flags=flags) as server:
        assert seen.exists() == is_warm
        assert server.status("/health/ready") == 200
