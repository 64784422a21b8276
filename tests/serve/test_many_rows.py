"""Two thousand requests in an engine whose model only checks that their state is theirs."""

import random
from types import SimpleNamespace

import pytest
import torch

from random_schedules import choose_at_random
from vox_serve import engine as engine_module
from vox_serve.engine import Engine, Request
from vox_serve.fifo import choose_all
from vox_serve.kv_cache import PAGE_SIZE, CacheBatch, KvCache
from vox_serve.mimi.state import StreamState
from vox_serve.request import Prompt
from vox_serve.sampling import SamplingParams, SamplingRows

NUM_ROWS = 2000
PROMPT_TOKENS = 6
NUM_FRAMES = 30  # three pages with the prompt, and the pool has two for each request


class CheckingModel:
    """Draws `seed, frame` as a frame's codes, and finds its sequence's seed in the cache."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(
        num_codebooks=2,
        follows_context=True,
        backbone=SimpleNamespace(
            num_layers=1, num_kv_heads=1, head_dim=1, dim=1, max_positions=4 * PAGE_SIZE
        ),
    )

    def backbone_step(self, frames, mask, batch: CacheBatch, cache: KvCache) -> torch.Tensor:
        seeds = frames[:, 0].float()
        keys = cache.k_pages.view(-1)
        assert len(batch.slots.unique()) == len(batch.slots)
        keys[batch.slots] = seeds
        if batch.cu_seqlens is not None:
            return seeds[batch.last_tokens, None]
        for ago in (1, PAGE_SIZE, 2 * PAGE_SIZE):
            before = (batch.positions - ago).clamp(min=0)
            pages = batch.page_table.gather(1, before[:, None] // PAGE_SIZE)[:, 0]
            assert torch.equal(keys[pages * PAGE_SIZE + before % PAGE_SIZE], seeds)
        return seeds[:, None]

    def draw_frames(self, hidden, rows: SamplingRows, persistent: bool = False) -> torch.Tensor:
        assert torch.equal(hidden[:, 0].long(), rows.seeds)
        return torch.stack((rows.seeds, rows.frames + 1), dim=1)

    def next_inputs(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = torch.nn.functional.pad(codes, (0, 1))
        return frames, torch.ones_like(frames, dtype=torch.bool)


class CountingCodec:
    """A stream's samples are the number of its frames."""

    config = SimpleNamespace(frame_samples=2, sample_rate_hz=24_000)

    def init_state(self, batch_size: int) -> StreamState:
        empty = torch.zeros(batch_size, 0)
        return StreamState(torch.zeros(batch_size, dtype=torch.int64), empty, empty, ())

    def decode_step(self, codes: torch.Tensor, state: StreamState) -> torch.Tensor:
        state.positions.add_(1)
        return state.positions[:, None].expand(-1, 2).float()


@pytest.mark.slow
@pytest.mark.parametrize("choose", [choose_all, choose_at_random(random.Random(0))])
def test_two_thousand_requests_share_few_pages(choose, monkeypatch):
    monkeypatch.setitem(engine_module.PREFILL_CHUNK_TOKENS, "cpu", NUM_ROWS * PROMPT_TOKENS)
    engine = Engine(
        CheckingModel(),
        CountingCodec(),
        prompts=None,
        max_batch_size=NUM_ROWS,
        kv_cache_bytes=NUM_ROWS
        * 2
        * PAGE_SIZE
        * KvCache.position_bytes(CheckingModel.config.backbone, torch.float32),
        choose=choose,
    )
    for seed in range(1, NUM_ROWS + 1):
        tokens = torch.full((PROMPT_TOKENS, 3), seed)
        request = Request(
            "",
            sampling=SamplingParams(seed=seed),
            max_frames=NUM_FRAMES,
            id=str(seed),
        )
        engine.add(request, Prompt.build(tokens, tokens > 0))
    num_frames = dict.fromkeys(map(str, range(1, NUM_ROWS + 1)), 0)
    while engine.has_work:
        for output in engine.step():
            num_frames[output.request_id] += 1
            count = num_frames[output.request_id]
            assert output.codes.tolist() == [int(output.request_id), count]
            assert output.audio.tolist() == [count, count]
    assert set(num_frames.values()) == {NUM_FRAMES}
    assert engine.num_losses > 0
