"""A policy that chooses at random, and runs with aborts and few pages that must change no bit."""

import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from checkpoints import TinyShape, build_tiny
from engine_testing import joined, run
from vox_serve.engine import Engine, Request
from vox_serve.kv_cache import PAGE_SIZE
from vox_serve.loading import load_engine
from vox_serve.policy import Row, Step
from vox_serve.sampling import SamplingParams
from vox_serve.step_times import StepTimes

SMALL = TinyShape(
    num_codebooks=2,
    layers=1,
    heads=2,
    kv_heads=1,
    ffn=32,
    max_positions=34,
    depth_layers=1,
    depth_heads=2,
    depth_ffn=32,
)
SMALL_PAGES = 3
"""Pages of a request of full length."""


def choose_at_random(rng: random.Random) -> Callable[..., Step]:
    """A policy by which any request may step or be prefilled, in any order."""

    def choose(rows: Iterable[Row], now_s: float, times: StepTimes, chunk_tokens: int) -> Step:
        rows = [row for row in rows if rng.random() < 0.6]
        rng.shuffle(rows)
        prompts = []
        for row in rows:
            count = rng.randint(1, row.num_missing) if row.num_missing else chunk_tokens + 1
            if count <= chunk_tokens:
                prompts.append((row, count))
                chunk_tokens -= count
        return Step([row for row in rows if not row.num_missing], prompts)

    return choose


def page_bytes(engine: Engine) -> int:
    config = engine.model.config.backbone
    return PAGE_SIZE * engine._cache.position_bytes(config, engine.model.dtype)


def engine_like(loaded: Engine, num_pages: int, cached_pages: int = 0, **settings) -> Engine:
    """An engine of the same model with so few pages."""
    size = page_bytes(loaded)
    return Engine(
        loaded.model,
        loaded.mimi,
        loaded.prompts,
        max_batch_size=6,
        kv_cache_bytes=num_pages * size,
        prefix_cache_bytes=cached_pages * size,
        **settings,
    )


def assert_a_schedule_changes_nothing(
    engine: Engine, requests: list[Request], alone: dict[str, tuple], rng: random.Random, **shares
) -> None:
    """Run requests by a random schedule that takes pages from some; see `run_at_random`.

    Args:
        engine, requests, rng, shares: as there.
        alone: the result of each request alone.
    """
    free = engine._cache.num_free_pages
    spoken = run_at_random(engine, requests, rng, **shares)
    for i, (codes, audio, reason) in alone.items():
        mine = spoken[i]
        if mine[2] == "aborted":
            codes, audio = codes[: len(mine[0])], audio[: len(mine[1])]
        else:
            assert mine[2] == reason
        assert torch.equal(mine[0], codes), i
        assert torch.equal(mine[1], audio), i
    assert engine._cache.num_free_pages == free
    assert engine._batch.members == []
    assert engine.num_losses > 0


def assert_a_small_schedule_changes_nothing(
    folder: Path, kernels: AbstractContextManager[None]
) -> None:
    """Two short requests with kernels that are emulated, which are slow.

    Args:
        folder: for the model.
        kernels: the ops run these within it.
    """
    engine = load_engine(
        str(build_tiny(SMALL, seed=21).write(folder)), dtype="float32", prefix_cache_bytes=0
    )
    requests = [
        Request("I", sampling=SamplingParams(seed=i), max_frames=1 + i, id=str(i)) for i in range(2)
    ]
    rng = random.Random(3)
    with kernels:
        alone = {"1": run(engine, requests[1])["1"]}
        engine = engine_like(engine, SMALL_PAGES, choose=choose_at_random(rng))
        assert_a_schedule_changes_nothing(engine, requests, alone, rng, lose_share=0.5)


def run_at_random(
    engine: Engine,
    requests: list[Request],
    rng: random.Random,
    abort_share: float = 0.0,
    lose_share: float = 0.0,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, str]]:
    """Add requests at random times, until all ended.

    Args:
        engine, requests: the requests to add.
        rng: the source of chance.
        abort_share: the share of steps after which a request is aborted.
        lose_share: that of steps after which one loses its pages.

    Returns:
        codes, audio and finish reason by request id; "aborted" is the reason of some.
    """
    left = list(requests)
    rng.shuffle(left)
    codes: dict[str, list[torch.Tensor]] = {request.id: [] for request in requests}
    audio: dict[str, list[torch.Tensor]] = {request.id: [] for request in requests}
    reasons: dict[str, str] = {}
    while left or engine.has_work:
        while left and rng.random() < 0.3:
            engine.add(left.pop())
        for output in engine.step():
            if output.codes is not None:
                codes[output.request_id].append(output.codes)
                audio[output.request_id].append(torch.from_numpy(output.audio))
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
        holders = [r for r in engine._live.values() if r.holds_pages and not r.is_begun]
        if holders and rng.random() < lose_share:
            engine._paging.suspend(rng.choice(holders))
        if rng.random() < abort_share:
            added = {request.id for request in requests} - {request.id for request in left}
            if speaking := sorted(added - set(reasons)):
                victim = rng.choice(speaking)
                engine.abort(victim)
                reasons[victim] = "aborted"
    return joined(engine, codes, audio, reasons)
