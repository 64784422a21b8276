"""Contexts that are prefilled while the engine has no request."""

import pytest
import torch

from checkpoints import build_tiny
from engine_testing import PACKABLE, random_context, run
from vox_serve.engine import Engine, Request
from vox_serve.idle_prefill import MAX_PROMPTS
from vox_serve.kv_cache import PAGE_SIZE
from vox_serve.loading import load_engine
from vox_serve.prompt import Segment
from vox_serve.request import Prompt
from vox_serve.sampling import SamplingParams

PRECISIONS = {
    "float32": {"dtype": "float32"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
}

torch.manual_seed(0)
CONTEXT = random_context(PACKABLE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(build_tiny(PACKABLE, seed=22).write(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module", params=PRECISIONS.values(), ids=PRECISIONS)
def loaded(folder, request) -> Engine:
    return load_engine(folder, **request.param)


def with_cache(loaded: Engine, num_pages: int) -> Engine:
    """An engine with the same weights, an empty cache and no default context."""
    cache = loaded._cache
    page_bytes = PAGE_SIZE * cache.position_bytes(loaded.model.config.backbone, loaded.model.dtype)
    size = num_pages * page_bytes
    return Engine(loaded.model, loaded.mimi, loaded.prompts, prefix_cache_bytes=size)


def prompt_of(engine: Engine, context) -> Prompt:
    return Prompt.build(*engine.prompts.build(context))


def steps(engine: Engine, monkeypatch, context) -> list[int]:
    """Prefill a context in idle time; returns the positions of each step."""
    counts = []
    original = engine.model.backbone_step

    def step(frames, mask, batch, cache):
        counts.append(len(frames))
        return original(frames, mask, batch, cache)

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "backbone_step", step)
        engine.idle.put("a", prompt_of(engine, context))
        while engine.idle.has_work:
            engine.idle.step()
    return counts


def speak(engine: Engine, context) -> tuple[torch.Tensor, int]:
    """The codes of a text, and the positions of its prompt that were computed."""
    missing = engine.num_found_positions - engine.num_prompt_positions
    request = Request("Of course.", 0, context, SamplingParams(seed=3), max_frames=5)
    codes = run(engine, request)[request.id][0]
    return codes, missing + engine.num_prompt_positions - engine.num_found_positions


def test_a_request_computes_its_text_alone_and_gets_the_same_codes(loaded, monkeypatch):
    expected, num_positions = speak(with_cache(loaded, 0), CONTEXT)
    engine = with_cache(loaded, 64)
    length = len(prompt_of(engine, CONTEXT).frames)
    assert sum(steps(engine, monkeypatch, CONTEXT)) == length
    codes, num_computed = speak(engine, CONTEXT)
    assert torch.equal(codes, expected)
    assert num_computed == num_positions - length
    assert steps(engine, monkeypatch, CONTEXT) == []


def test_a_request_that_comes_meanwhile_finds_what_is_there(loaded, monkeypatch):
    expected, num_positions = speak(with_cache(loaded, 0), CONTEXT)
    engine = with_cache(loaded, 64)
    monkeypatch.setattr(engine.idle, "_chunk_tokens", PAGE_SIZE)
    engine.idle.put("a", prompt_of(engine, CONTEXT))
    engine.idle.step()
    codes, num_computed = speak(engine, CONTEXT)
    assert torch.equal(codes, expected)
    assert num_computed == num_positions - PAGE_SIZE


@pytest.mark.parametrize("num_pages", [0, 1])
def test_a_cache_without_room_ends_it(loaded, monkeypatch, num_pages):
    engine = with_cache(loaded, num_pages)
    length = len(prompt_of(engine, CONTEXT).frames)
    assert length > 2 * PAGE_SIZE
    monkeypatch.setattr(engine.idle, "_chunk_tokens", PAGE_SIZE)
    assert len(steps(engine, monkeypatch, CONTEXT)) <= num_pages + 1
    assert engine.cache_counts()["pages_held"] == 0


def test_it_takes_no_page_that_a_request_holds(loaded, monkeypatch):
    expected, _ = speak(with_cache(loaded, 0), CONTEXT)
    engine = with_cache(loaded, 0)
    engine._cache._pool._free = engine._cache._pool._free[:8]
    request = Request("Of course.", 0, CONTEXT, SamplingParams(seed=3), max_frames=5)
    engine.add(request)
    codes = [out.codes for out in engine.step() if out.codes is not None]
    steps(engine, monkeypatch, [Segment(1, "Another one.", CONTEXT[0].codes.repeat(8, 1))])
    while engine.has_work:
        codes += [out.codes for out in engine.step() if out.codes is not None]
    assert torch.equal(torch.stack(codes), expected)


def test_numbers_that_are_not_finite_are_not_kept(loaded, monkeypatch):
    expected, num_positions = speak(with_cache(loaded, 0), CONTEXT)
    engine = with_cache(loaded, 64)
    original = engine.model.backbone_step
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "backbone_step", lambda *args: original(*args) * torch.nan)
        engine.idle.put("a", prompt_of(engine, CONTEXT))
        while engine.idle.has_work:
            engine.idle.step()
    assert engine.cache_counts()["pages_cached"] == 0
    codes, num_computed = speak(engine, CONTEXT)
    assert torch.equal(codes, expected)
    assert num_computed == num_positions


def test_the_oldest_prompt_is_dropped_beyond_the_most(loaded):
    engine = with_cache(loaded, 64)
    prompt = prompt_of(engine, CONTEXT)
    for number in range(MAX_PROMPTS + 3):
        engine.idle.put(str(number), prompt)
    engine.idle.put("5", prompt)
    assert len(engine.idle._prompts) == MAX_PROMPTS
    assert "2" not in engine.idle._prompts
    assert "3" in engine.idle._prompts


def test_a_reset_drops_all(loaded):
    engine = with_cache(loaded, 64)
    engine.idle.put("a", prompt_of(engine, CONTEXT))
    engine.reset()
    assert not engine.idle.has_work
