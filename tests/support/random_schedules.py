"""A policy that chooses at random, and a run with aborts and few pages."""

import random
from collections.abc import Callable, Iterable

import torch

from engine_testing import joined
from vox_serve.engine import Engine, Request
from vox_serve.kv_cache import PAGE_SIZE
from vox_serve.policy import Row, Step
from vox_serve.step_times import StepTimes


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
