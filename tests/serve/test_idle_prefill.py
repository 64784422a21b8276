"""Contexts that are prefilled while the engine has no request."""

import contextlib

import pytest
import torch

from checkpoints import build_tiny
from engine_testing import PACKABLE, random_context, run
from vox_serve.engine import Engine, Request
from vox_serve.idle_prefill import MAX_CONTEXTS
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


def put(engine: Engine, context, client: str = "", key: str = "", is_wanted=lambda: True) -> None:
    engine.idle_prefill.put(client, key, lambda: prompt_of(engine, context), is_wanted)
    while engine.idle_prefill.build_next():
        pass


def steps(engine: Engine, context) -> list[int]:
    """Prefill a context in idle time; returns the positions of each step."""
    counts = []
    put(engine, context)
    for _ in range(100):
        if not engine.idle_prefill.has_work:
            return counts
        before = engine.idle_prefill.num_positions
        engine.idle_prefill.step()
        counts.append(engine.idle_prefill.num_positions - before)
    raise AssertionError("it does not end")


def speak(engine: Engine, context) -> tuple[torch.Tensor, int]:
    """The codes of a text, and the positions of its prompt that were computed."""
    missing = engine.num_found_positions - engine.num_prompt_positions
    request = Request("Of course.", 0, context, SamplingParams(seed=3), max_frames=5)
    codes = run(engine, request)[request.id][0]
    return codes, missing + engine.num_prompt_positions - engine.num_found_positions


def test_a_request_computes_its_text_alone_and_gets_the_same_codes(loaded):
    expected, num_positions = speak(with_cache(loaded, 0), CONTEXT)
    engine = with_cache(loaded, 64)
    length = len(prompt_of(engine, CONTEXT).frames)
    assert sum(steps(engine, CONTEXT)) == length
    codes, num_computed = speak(engine, CONTEXT)
    assert torch.equal(codes, expected)
    assert num_computed == num_positions - length
    assert steps(engine, CONTEXT) == [0]


def test_a_request_that_comes_meanwhile_finds_what_is_there(loaded, monkeypatch):
    expected, num_positions = speak(with_cache(loaded, 0), CONTEXT)
    engine = with_cache(loaded, 64)
    monkeypatch.setattr(engine.idle_prefill, "_chunk_tokens", PAGE_SIZE)
    put(engine, CONTEXT)
    engine.idle_prefill.step()
    codes, num_computed = speak(engine, CONTEXT)
    assert torch.equal(codes, expected)
    assert num_computed == num_positions - PAGE_SIZE


@pytest.mark.parametrize("num_pages", [1, 2])
def test_it_ends_when_the_cache_keeps_no_more(loaded, monkeypatch, num_pages):
    engine, context = with_cache(loaded, num_pages), 2 * CONTEXT
    assert len(prompt_of(engine, context).frames) > (num_pages + 1) * PAGE_SIZE
    monkeypatch.setattr(engine.idle_prefill, "_chunk_tokens", PAGE_SIZE)
    assert steps(engine, context) == [PAGE_SIZE] * (num_pages + 1) + [0]
    assert engine.cache_counts()["pages_held"] == 0


def test_without_a_prefix_cache_there_is_nothing_to_do(loaded):
    engine = with_cache(loaded, 0)
    put(engine, CONTEXT)
    assert not engine.idle_prefill.has_work


@pytest.mark.parametrize("fault", ["nan", "error"])
def test_a_fault_is_forgotten_and_the_default_context_stays(loaded, monkeypatch, fault):
    engine = Engine(
        loaded.model,
        loaded.mimi,
        loaded.prompts,
        default_context=CONTEXT,
        prefix_cache_bytes=2**24,
    )
    held = engine.cache_counts()["pages_held"]
    turns = [*CONTEXT, Segment(1, "What was said before.", CONTEXT[0].codes)]
    expected, num_positions = speak(engine, CONTEXT)
    engine.reset()
    original = engine.model.backbone_step

    def step(*args):
        if fault == "error":
            raise RuntimeError("the device failed")
        return original(*args) * torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "backbone_step", step)
        put(engine, turns)
        with contextlib.suppress(RuntimeError):
            engine.idle_prefill.step()
    assert not engine.idle_prefill.has_work
    counts = engine.cache_counts()
    assert (counts["pages_held"], counts["pages_cached"]) == (held, 0)
    codes, num_computed = speak(engine, CONTEXT)
    assert torch.equal(codes, expected)
    assert num_computed == num_positions


def test_the_client_with_the_most_contexts_loses_its_oldest(loaded):
    engine = with_cache(loaded, 64)
    put(engine, CONTEXT, "quiet", "0")
    for number in range(MAX_CONTEXTS + 3):
        put(engine, CONTEXT, "busy", str(number))
    put(engine, CONTEXT, "busy", "5")
    names = list(engine.idle_prefill._contexts)
    assert len(names) == MAX_CONTEXTS
    assert names[:2] == [("quiet", "0"), ("busy", "4")]
    assert names[-1] == ("busy", "5")


def test_a_second_context_takes_the_place_of_the_clients_first(loaded):
    engine = with_cache(loaded, 64)
    for number in range(MAX_CONTEXTS):
        put(engine, CONTEXT, str(number), "first")
    put(engine, CONTEXT, "7", "second")
    names = list(engine.idle_prefill._contexts)
    assert len(names) == MAX_CONTEXTS
    assert ("7", "first") not in names
    assert names[-1] == ("7", "second")


def test_a_context_that_nobody_wants_any_more_is_computed_no_further(loaded, monkeypatch):
    engine = with_cache(loaded, 64)
    monkeypatch.setattr(engine.idle_prefill, "_chunk_tokens", PAGE_SIZE)
    wanted = [True]
    put(engine, CONTEXT, is_wanted=lambda: wanted[0])
    engine.idle_prefill.step()
    wanted[0] = False
    engine.idle_prefill.step()
    assert not engine.idle_prefill.has_work
    assert engine.idle_prefill.num_positions == PAGE_SIZE


def test_a_newer_context_replaces_one_in_progress(loaded, monkeypatch):
    engine = with_cache(loaded, 64)
    monkeypatch.setattr(engine.idle_prefill, "_chunk_tokens", PAGE_SIZE)
    put(engine, CONTEXT)
    engine.idle_prefill.step()
    put(engine, CONTEXT[1:])
    while engine.idle_prefill.has_work:
        engine.idle_prefill.step()
    length = len(prompt_of(engine, CONTEXT[1:]).frames)
    assert engine.idle_prefill.num_positions == PAGE_SIZE + length


def test_a_reset_drops_all(loaded, monkeypatch):
    engine = with_cache(loaded, 64)
    monkeypatch.setattr(engine.idle_prefill, "_chunk_tokens", PAGE_SIZE)
    put(engine, CONTEXT)
    engine.idle_prefill.step()
    put(engine, CONTEXT)
    engine.reset()
    assert not engine.idle_prefill.has_work
