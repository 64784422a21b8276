"""A prompt's cached part changes no code, is computed once and is never written to again."""

import random

import pytest
import torch

from checkpoints import TinyShape, build_tiny
from csm_reference import reference_generate
from engine_testing import GREEDY, PACKABLE, random_context, run, run_one
from vox_serve.engine import Engine, Request
from vox_serve.kv_cache import PAGE_SIZE
from vox_serve.loading import load_engine
from vox_serve.prompt import Segment
from vox_serve.sampling import SamplingParams

PRECISIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
}
NUM_FRAMES = 20  # more than a page
NUM_TURNS = 3

torch.manual_seed(0)
CONTEXT = random_context(PACKABLE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    tiny = build_tiny(PACKABLE, seed=21)
    return str(tiny.write(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module", params=PRECISIONS.values(), ids=PRECISIONS)
def loaded(folder, request) -> Engine:
    return load_engine(folder, **request.param)


def with_cache(loaded: Engine, num_bytes: int, max_batch_size: int = 8) -> Engine:
    """An engine with the same weights, an empty cache and no default context."""
    return Engine(
        loaded.model,
        loaded.mimi,
        loaded.prompts,
        max_batch_size=max_batch_size,
        prefix_cache_bytes=num_bytes,
    )


def turn(number: int, context: list[Segment], **fields) -> Request:
    fields = {"sampling": SamplingParams(seed=number), "max_frames": NUM_FRAMES, **fields}
    return Request(f"This is turn {number}.", number % 2, context, **fields)


def converse(engine: Engine, num_turns: int = 5, between=lambda: None) -> list[torch.Tensor]:
    """Each turn follows all earlier ones; returns the codes of each."""
    context, spoken = list(CONTEXT), []
    for number in range(num_turns):
        request = turn(number, list(context))
        codes = run(engine, request)[request.id][0]
        context.append(Segment(request.speaker, request.text, codes))
        spoken.append(codes)
        between()
    return spoken


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mine, theirs), number


class PrefillCounter:
    """Counts the positions that an engine prefills."""

    def __init__(self, engine: Engine, monkeypatch):
        self.count = 0
        original = engine.model.backbone_step

        def step(frames, mask, batch, cache):
            if batch.cu_seqlens is not None:
                self.count += len(frames)
            return original(frames, mask, batch, cache)

        monkeypatch.setattr(engine.model, "backbone_step", step)


@pytest.mark.slow
def test_cached_rebuilt_and_evicted_contexts_give_equal_codes(loaded):
    recomputed = converse(with_cache(loaded, 0))
    cached = with_cache(loaded, 2**24)
    assert_same(converse(cached), recomputed)
    assert cached.num_found_positions > 0.75 * cached.num_prompt_positions
    assert_same(converse(cached), recomputed)
    cached.reset()
    assert_same(converse(cached), recomputed)

    def evict() -> None:
        run(small, turn(90, [], max_frames=2 * PAGE_SIZE))

    small = with_cache(loaded, 3 * PAGE_SIZE * position_bytes(loaded))
    assert_same(converse(small, between=evict), recomputed)


def position_bytes(engine: Engine) -> int:
    cache = engine._cache
    return cache.position_bytes(engine.model.config.backbone, engine.model.dtype)


@pytest.mark.slow
def test_neighbours_change_no_code(loaded):
    """Eight conversations with a common beginning; turns join and leave at random."""
    alone = [converse_of(with_cache(loaded, 0), i) for i in range(8)]
    rng = random.Random(3)
    expected = [codes for spoken in alone for codes in spoken]
    for size in (0, 2**13, 2**24):
        assert_same(converse_together(with_cache(loaded, size, 6), rng), expected)


def request_of(conversation: int, number: int, context: list[Segment]) -> Request:
    seed = 10 * conversation + number
    return Request(
        f"Turn {number} of {conversation}.",
        number % 2,
        list(context),
        SamplingParams(seed=seed),
        max_frames=3 + (7 * seed) % 30,
        id=f"{conversation}/{number}",
    )


def converse_of(engine: Engine, conversation: int) -> list[torch.Tensor]:
    context, spoken = list(CONTEXT), []
    for number in range(NUM_TURNS):
        request = request_of(conversation, number, context)
        spoken.append(run(engine, request)[request.id][0])
        context.append(Segment(request.speaker, request.text, spoken[-1]))
    return spoken


def converse_together(engine: Engine, rng: random.Random) -> list[torch.Tensor]:
    contexts = [list(CONTEXT) for _ in range(8)]
    numbers = [0] * 8
    spoken: dict[str, list[torch.Tensor]] = {}
    open_requests: dict[str, Request] = {}
    idle = list(range(8))
    while idle or open_requests:
        if idle and (not open_requests or rng.random() < 0.3):
            i = idle.pop(rng.randrange(len(idle)))
            request = request_of(i, numbers[i], contexts[i])
            open_requests[request.id] = request
            spoken[request.id] = []
            engine.add(request)
        before = named_pages(engine)
        for output in engine.step():
            if output.codes is not None:
                spoken[output.request_id].append(output.codes)
            if output.finish_reason:
                request = open_requests.pop(output.request_id)
                i = int(request.id.split("/")[0])
                codes = torch.stack(spoken[request.id])
                contexts[i].append(Segment(request.speaker, request.text, codes))
                numbers[i] += 1
                if numbers[i] < NUM_TURNS:
                    idle.append(i)
        check_unchanged(engine, before)
    return [torch.stack(spoken[f"{i}/{n}"]) for i in range(8) for n in range(NUM_TURNS)]


def named_pages(engine: Engine) -> dict[tuple[int, bytes], tuple[torch.Tensor, torch.Tensor]]:
    cache = engine._cache
    return {
        (page, key): (cache.k_pages[:, page].clone(), cache.v_pages[:, page].clone())
        for page, key in cache._pool._keys.items()
    }


def check_unchanged(engine: Engine, before) -> None:
    """Pages that kept their key kept their contents."""
    cache = engine._cache
    for (page, key), (k, v) in before.items():
        if cache._pool._keys.get(page) == key and page not in cache._pool._cached:
            assert torch.equal(cache.k_pages[:, page], k)
            assert torch.equal(cache.v_pages[:, page], v)


def test_a_turn_prefills_little_more_than_its_own_text(loaded, monkeypatch):
    engine = with_cache(loaded, 2**24)
    counter = PrefillCounter(engine, monkeypatch)
    counts = []
    converse(engine, between=lambda: counts.append(counter.count))
    for number in range(1, len(counts)):
        own = len(engine.prompts.tokens(Segment(0, f"This is turn {number}.")))
        # The last frame was not fed back, and a frame of zeros ends the segment.
        assert counts[number] - counts[number - 1] == own + 2


def test_a_repeated_prompt_is_found_up_to_its_last_page(loaded, monkeypatch):
    engine = with_cache(loaded, 2**24)
    counter = PrefillCounter(engine, monkeypatch)
    first = run(engine, request := turn(1, CONTEXT))[request.id][0]
    length = counter.count
    again = run(engine, request := turn(1, CONTEXT))[request.id][0]
    assert torch.equal(first, again)
    assert counter.count - length == 1 + (length - 1) % PAGE_SIZE


def test_what_was_heard_is_found_after_a_cut(loaded, monkeypatch):
    """A turn whose end was not heard: the rest of it is still in the cache, and not used."""
    spoken = converse(with_cache(loaded, 0), 1)[0]
    heard = [*CONTEXT, Segment(0, "This is turn 0.", spoken[:7])]
    engines = with_cache(loaded, 0), with_cache(loaded, 2**24)
    converse(engines[1], 1)
    codes = [run(e, request := turn(1, heard))[request.id][0] for e in engines]
    assert torch.equal(*codes)


def test_greedy_turns_equal_transformers(tmp_path):
    tiny = build_tiny(TinyShape(), seed=9)
    engine = load_engine(str(tiny.write(tmp_path)), dtype="float32")
    context = random_context(tiny.shape)
    for number in range(6):
        if number == 3:  # a turn that was not generated here
            context += random_context(tiny.shape)[:1]
        text, speaker = f"This is turn {number}.", number % 2
        codes, _, _ = run_one(
            engine, text=text, speaker=speaker, context=context, sampling=GREEDY, max_frames=9
        )
        expected = reference_generate(tiny, [*context, Segment(speaker, text)], 9)
        assert torch.equal(codes, expected), number
        context.append(Segment(speaker, text, codes))
    assert engine.num_found_positions > 0.6 * engine.num_prompt_positions


@pytest.mark.slow
def test_the_cache_stays_within_its_bound(loaded):
    page_bytes = PAGE_SIZE * position_bytes(loaded)
    engine = with_cache(loaded, 5 * page_bytes + 1)
    for number in range(20):
        run(engine, turn(number, CONTEXT))
        assert engine._cache.num_cached_pages <= 5
    assert engine._cache.num_cached_pages == 5


def test_the_caches_figures(loaded):
    page_bytes = PAGE_SIZE * position_bytes(loaded)
    engine = with_cache(loaded, 100 * page_bytes)
    empty = engine.cache_counts()
    assert empty == {**dict.fromkeys(empty, 0), "pages": engine._cache.k_pages.shape[1]}
    engine.add(request := turn(1, CONTEXT))
    engine.step()
    length = len(engine.prepare(request).frames)
    live = engine.cache_counts()
    assert live["pages_held"] == -(-length // PAGE_SIZE)
    assert live["bytes_held"] == live["pages_held"] * page_bytes
    assert (live["positions_asked"], live["positions_found"]) == (length, 0)
    engine.abort(request.id)
    run(engine, request)
    ended = engine.cache_counts()
    assert (ended["pages_held"], ended["positions_asked"]) == (0, 2 * length)
    assert length - PAGE_SIZE <= ended["positions_found"] < length
    assert ended["pages_cached"] == engine._cache.num_cached_pages > 0
    assert ended["bytes_cached"] == ended["pages_cached"] * page_bytes


@pytest.mark.parametrize("num_steps", [1, 2, 19])
def test_an_aborted_turn_is_found(loaded, num_steps):
    expected = run(with_cache(loaded, 0), request := turn(1, CONTEXT))
    expected = expected[request.id][0]
    engine = with_cache(loaded, 2**24)
    engine.add(request)
    for _ in range(num_steps):
        engine.step()
    engine.abort(request.id)
    assert torch.equal(run(engine, request)[request.id][0], expected)
    assert engine.num_found_positions


def test_a_failed_request_leaves_nothing_to_find(loaded):
    engine = with_cache(loaded, 2**24)
    request = turn(1, CONTEXT)
    engine.add(request)
    engine.step()
    with torch.inference_mode():
        engine._cache.v_pages[0, engine._live[request.id].cache.pages[0]] = torch.nan
    (output,) = [out for out in (*engine.step(), *engine.step()) if out.finish_reason]
    assert output.finish_reason == "error"
    assert engine._cache.num_cached_pages == 0
    expected = run(with_cache(loaded, 0), request)[request.id][0]
    assert torch.equal(run(engine, request)[request.id][0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("is_ruined", [False, True])
@pytest.mark.parametrize("num_pages", [0, 3])
def test_a_failed_request_leaves_the_default_context(loaded, num_pages, is_ruined, monkeypatch):
    """As it is, or computed again if the fault is in its own pages."""
    parts = loaded.model, loaded.mimi, loaded.prompts, CONTEXT
    size = num_pages * PAGE_SIZE * position_bytes(loaded)
    engine = Engine(*parts, prefix_cache_bytes=size)
    free_pages = engine._cache.num_free_pages
    expected = run(engine, wanted := turn(2, None))[wanted.id][0]
    counter = PrefillCounter(engine, monkeypatch)
    engine.add(request := turn(1, None))
    engine.step()
    cache = engine._live[request.id].cache
    page = cache.pages[0 if is_ruined else (cache.length - 1) // PAGE_SIZE]
    with torch.inference_mode():
        engine._cache.v_pages[0, page] = torch.nan
    (output,) = [out for out in (*engine.step(), *engine.step()) if out.finish_reason]
    assert output.finish_reason == "error"
    counter.count = 0
    assert torch.equal(run(engine, wanted)[wanted.id][0], expected)
    assert counter.count <= len(engine.prompts.tokens(Segment(0, "This is turn 2.")))
    assert engine._cache.num_free_pages == free_pages


@pytest.mark.slow
@pytest.mark.parametrize("num_pages", [0, 3])
def test_the_default_context_is_kept_and_takes_nothing_from_the_rest(
    loaded, num_pages, monkeypatch
):
    size = num_pages * PAGE_SIZE * position_bytes(loaded)
    parts = loaded.model, loaded.mimi, loaded.prompts, CONTEXT
    engine = Engine(*parts, prefix_cache_bytes=size)
    counter = PrefillCounter(engine, monkeypatch)
    own = len(engine.prompts.tokens(Segment(0, "This is turn 2.")))
    other = random_context(PACKABLE)
    for _ in range(2):
        run(engine, turn(1, other), turn(1, None))
        assert engine._cache.num_cached_pages == num_pages
        counter.count = 0
        run(engine, turn(2, None))
        assert counter.count == own
