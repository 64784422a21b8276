"""The engine equals transformers, code for code, and itself whatever else is in the batch."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints import TinyShape, build_tiny
from csm_reference import reference_generate, reference_trace
from emulated_kernels import emulated_gpu
from engine_testing import (
    GREEDY,
    PACKABLE,
    SHAPES,
    TEXTS,
    random_context,
    run,
    run_one,
    share_of_equal_codes,
)
from vox_serve import engine as engine_module
from vox_serve import frame_batch, loading, model
from vox_serve.cuda_graphs import rounded_rows
from vox_serve.engine import Engine, PromptTooLongError, Request
from vox_serve.frame_batch import FrameBatch, Half
from vox_serve.loading import load_engine
from vox_serve.policy import choose_step
from vox_serve.prompt import CHARS_PER_POSITION, Segment
from vox_serve.sampling import SamplingParams

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def write(tiny, **layout):
        return str(tiny.write(tmp_path_factory.mktemp("checkpoint"), **layout))

    return write


@pytest.mark.parametrize("with_context", [False, True], ids=["alone", "with context"])
@pytest.mark.parametrize("rope", ["llama3", "default"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=name, marks=() if name == "gqa" else pytest.mark.slow)
        for name, shape in SHAPES.items()
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_codes_equal_transformers(folder, device, shape, rope, with_context):
    tiny = build_tiny(shape, seed=1, rope=rope)
    engine = load_engine(folder(tiny), device=device, dtype=torch.float32)
    context = random_context(shape) if with_context else []
    frames = max(4, 48 // shape.num_codebooks)
    for text in TEXTS[:2] if shape.num_codebooks > 8 else TEXTS:
        expected = reference_generate(tiny, [*context, Segment(1, text)], frames)
        codes, _, reason = run_one(
            engine, text=text, speaker=1, context=context, sampling=GREEDY, max_frames=frames
        )
        assert torch.equal(codes, expected)
        assert reason == "length"


@pytest.fixture
def cuda_kernels_on_the_host():
    with emulated_gpu():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_kernels_on_the_host")
@pytest.mark.parametrize("shape", ["gqa", "mqa"])
def test_greedy_codes_of_cuda_kernels_equal_transformers(folder, shape):
    tiny = build_tiny(SHAPES[shape], seed=1)
    engine = load_engine(folder(tiny))
    requests = [Request(text=text, sampling=GREEDY, max_frames=3) for text in TEXTS[:2]]
    spoken = run(engine, *requests)
    for request in requests:
        expected = reference_generate(tiny, [Segment(0, request.text)], 3)
        assert torch.equal(spoken[request.id][0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_greedy_codes_of_cuda_kernels_with_packed_weights_are_the_cpus(
    folder, quantize, request, monkeypatch
):
    """Nearly: if sums differ in the last place, an activation may round to a neighbouring int8,
    and that may change a code and all that follow. So those up to the first that differs count.
    """
    monkeypatch.setattr(loading, "codec_precision", lambda *_: "float32")  # as on a GPU
    path = folder(build_tiny(PACKABLE, seed=4))
    requests = [Request(text=text, sampling=GREEDY, max_frames=4) for text in TEXTS[:3]]
    expected = run(load_engine(path, quantize=quantize), *requests)
    request.getfixturevalue("cuda_kernels_on_the_host")
    spoken = run(load_engine(path, quantize=quantize), *requests)
    assert share_of_equal_codes(spoken, expected) > 0.95


@pytest.mark.parametrize(
    "layout",
    [
        {"layout": "sharded"},
        {"layout": "original", "codec": "mimi"},
        {"rope_spelling": "scaling"},
        {"audio_tables": "depth"},
        {"audio_tables": "backbone", "codec": "mimi"},
    ],
    ids=str,
)
def test_every_layout_gives_the_same_codes(folder, layout):
    tiny = build_tiny(seed=2)
    engine = load_engine(folder(tiny, **layout))
    expected = reference_generate(tiny, [Segment(0, "Again.")], 8)
    codes, _, _ = run_one(engine, text="Again.", sampling=GREEDY, max_frames=8)
    assert torch.equal(codes, expected)


def test_audio_equals_transformers(folder):
    tiny = build_tiny(seed=3)
    engine = load_engine(folder(tiny))
    codes, audio, _ = run_one(engine, text="Sound.", sampling=GREEDY, max_frames=20)
    valid = codes.clamp(max=tiny.shape.audio_vocab_size - 4)
    expected = tiny.model.codec_model.decode(valid.T[None]).audio_values[0, 0]
    assert len(audio) == 20 * 1920
    torch.testing.assert_close(audio, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stop_frame", [0, 1, 3])
def test_stops_at_an_all_zero_frame(folder, stop_frame):
    tiny = build_tiny(stop_frame=stop_frame)
    engine = load_engine(folder(tiny))
    trace = reference_trace(tiny, [Segment(0, "Stop.")], 10)
    assert trace.stopped
    codes, audio, reason = run_one(engine, text="Stop.", sampling=GREEDY, max_frames=10)
    assert torch.equal(codes, trace.codes)
    assert len(codes) == stop_frame
    assert len(audio) == stop_frame * 1920
    assert reason == "stop"


def test_a_frame_with_one_code_set_is_no_stop(folder):
    tiny = build_tiny(stop_frame=1, near_stop=True)
    engine = load_engine(folder(tiny))
    codes, _, reason = run_one(engine, text="Go on.", sampling=GREEDY, max_frames=6)
    assert torch.equal(codes, reference_generate(tiny, [Segment(0, "Go on.")], 6))
    assert reason == "length"


def eight_requests() -> list[Request]:
    """Eight requests that differ in text, seed, length and every sampling parameter."""
    return [
        Request(
            text=f"Number {i}." * (1 + i % 3),
            speaker=i % 2,
            sampling=SamplingParams(
                temperature=(0.0, 0.7, 1.3)[i % 3],
                top_k=(0, 5, 50)[i % 3],
                top_p=(1.0, 0.9)[i % 2],
                min_p=(0.0, 0.05)[i // 4],
                repetition_penalty=(1.0, 1.2)[i % 2],
                repetition_window=1 + i,
                seed=100 + i,
            ),
            max_frames=3 + 2 * i,
            id=str(i),
        )
        for i in range(8)
    ]


@pytest.fixture(scope="module", params=DEVICES)
def engine(folder, request) -> Engine:
    tiny = build_tiny(seed=4)
    # Without a cache for what nobody holds, or most tests would skip the prompts of earlier ones.
    return load_engine(
        folder(tiny), device=request.param, dtype=torch.float32, prefix_cache_bytes=0
    )


@pytest.fixture(scope="module")
def alone(engine) -> dict[str, tuple]:
    """Results of the eight requests, each run alone."""
    return {request.id: run(engine, request)[request.id] for request in eight_requests()}


def assert_same(got: dict[str, tuple], expected: dict[str, tuple]) -> None:
    for i, (codes, audio, reason) in expected.items():
        assert torch.equal(got[i][0], codes), i
        assert torch.equal(got[i][1], audio), i
        assert got[i][2] == reason


def test_a_batch_changes_no_code(engine, alone):
    assert_same(run(engine, *eight_requests()), alone)


def test_joining_late_changes_no_code(engine, alone):
    requests = eight_requests()
    outputs = []
    while requests or engine.has_work:
        if requests:
            engine.add(requests.pop())
        outputs += engine.step()
    for i, (codes, _, _) in alone.items():
        mine = [out.codes for out in outputs if out.request_id == i and out.codes is not None]
        assert torch.equal(torch.stack(mine), codes)


def test_a_queue_changes_no_code(engine, alone):
    narrow = Engine(engine.model, engine.mimi, engine.prompts, max_batch_size=2)
    assert_same(run(narrow, *eight_requests()), alone)


def test_prefill_chunks_change_no_code(engine, alone, monkeypatch):
    monkeypatch.setitem(engine_module.PREFILL_CHUNK_TOKENS, engine.model.device.type, 5)
    assert_same(run(engine, *eight_requests()), alone)


def test_a_newcomer_gets_its_first_frame_in_a_step_of_its_own(engine, alone):
    """The listeners of the others have audio in hand."""
    seconds = itertools.count()
    engine = Engine(
        engine.model,
        engine.mimi,
        engine.prompts,
        choose=choose_step,
        clock=lambda: next(seconds) * 1e-3,
    )
    requests = [replace(request, streams=True) for request in eight_requests()[4:7]]
    codes: dict[str, list[torch.Tensor]] = {request.id: [] for request in requests}

    def step() -> set[str]:
        outputs = engine.step()
        for output in outputs:
            if output.codes is not None:
                codes[output.request_id].append(output.codes)
        return {output.request_id for output in outputs}

    engine.add(requests[0])
    engine.add(requests[1])
    while not (codes["4"] and codes["5"]):
        step()
    engine.add(requests[2])
    first: set[str] = set()
    while not first:
        first = step()
    assert first == {"6"}
    while engine.has_work:
        step()
    for request in requests:
        assert torch.equal(torch.stack(codes[request.id]), alone[request.id][0])


def test_unused_rows_change_no_code(engine, alone, monkeypatch):
    """A GPU runs only a few batch sizes and pads the batch with unused rows."""
    monkeypatch.setitem(frame_batch.PADS, engine.model.device.type, True)
    # Requests get pages that others freed, some steps before they get a row.
    monkeypatch.setitem(engine_module.PREFILL_CHUNK_TOKENS, engine.model.device.type, 5)
    engine = Engine(engine.model, engine.mimi, engine.prompts, max_batch_size=4)
    for _ in range(2):  # the second time, rows hold stale state of the first
        assert_same(run(engine, *eight_requests()), alone)
        rows = engine._batch.num_rows
        assert engine._batch._cache_rows.batch(rows).slots.tolist() == [-1] * rows


def test_a_frame_can_be_captured(engine):
    """It reads no value on the host, and its tensors keep their addresses."""
    batch = engine._batch

    def addresses() -> list[int]:
        rows = [*batch._cache_rows.tensors, *batch._sampling]
        tensors = [batch._codes, batch._hidden, batch._audio, *rows, *batch._streams.tensors]
        return [tensor.data_ptr() for tensor in tensors]

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
            assert function._opname not in waits
            return function(*args, **(kwargs or {}))

    before = addresses()
    run(engine, *eight_requests())
    with Recorder(), torch.inference_mode():
        batch._run_backbone(3)
        batch._run_draw(3)
        with pytest.raises(AssertionError):
            bool(batch._codes.any())
    assert addresses() == before


@pytest.mark.parametrize("ahead", [1, 3])
def test_frames_ahead_change_no_code(engine, alone, monkeypatch, ahead):
    """A GPU begins a frame before the host sees the previous one."""
    monkeypatch.setitem(engine_module.FRAMES_AHEAD, engine.model.device.type, ahead)
    free = engine._cache.num_free_pages
    assert_same(run(engine, *eight_requests()), alone)
    assert_same(run(engine, eight_requests()[5]), {"5": alone["5"]})
    assert engine._cache.num_free_pages == free


@pytest.mark.parametrize("stop_frame", [0, 3])
def test_a_frame_after_the_stop_is_discarded(folder, monkeypatch, stop_frame):
    monkeypatch.setitem(engine_module.FRAMES_AHEAD, "cpu", 1)
    engine = load_engine(folder(build_tiny(stop_frame=stop_frame)), max_batch_size=2)
    requests = [Request(text="Stop.", sampling=GREEDY, max_frames=n) for n in (9, 2, 5, 7, 9)]
    ends = run(engine, *requests)
    for request in requests:
        codes, audio, reason = ends[request.id]
        assert len(codes) == min(stop_frame, request.max_frames)
        assert len(audio) == len(codes) * 1920
        assert reason == ("length" if request.max_frames <= stop_frame else "stop")


@pytest.mark.parametrize(
    ("rows", "rounded"),
    [(1, 1), (2, 2), (3, 4), (9, 16), (17, 32), (100, 112), (129, 160), (300, 320), (999, 1000)],
)
def test_rounded_batch_sizes_of_a_gpu(rows, rounded):
    assert rounded_rows(rows, 1000) == rounded
    assert rounded_rows(rounded, 1000) == rounded


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_weights_keep_requests_apart(folder, quantize, monkeypatch):
    """In a batch, and with chunked prompts, each request gets the codes that it gets alone."""
    path = folder(build_tiny(PACKABLE, seed=4))
    engine = load_engine(path, quantize=quantize)
    alone = {request.id: run(engine, request)[request.id] for request in eight_requests()}
    assert_same(run(engine, *eight_requests()), alone)
    monkeypatch.setitem(engine_module.PREFILL_CHUNK_TOKENS, "cpu", 5)
    assert_same(run(engine, *eight_requests()), alone)
    plain = run(load_engine(path), *eight_requests())
    assert any(not torch.equal(plain[i][0], alone[i][0]) for i in alone)


def test_seeds_decide(engine):
    def codes(seed):
        sampling = SamplingParams(temperature=1.5, top_k=0, seed=seed)
        return run_one(engine, text="Dice.", sampling=sampling, max_frames=6)[0]

    assert torch.equal(codes(1), codes(1))
    assert not torch.equal(codes(1), codes(2))
    assert not torch.equal(codes(None), codes(None))


@pytest.mark.slow
def test_sampled_codes_follow_the_model(engine):
    """Codebook 0 of the first frame over many seeds, against transformers' probabilities."""
    tiny = build_tiny(seed=4)
    trace = reference_trace(tiny, [Segment(0, "Odds.")], 1)
    top_k, temperature, draws = 6, 2.0, 600
    logits = trace.logits[0, 0] / temperature
    kept = logits.topk(top_k).indices
    expected = torch.softmax(logits[kept], 0) * draws
    requests = [
        Request(
            text="Odds.",
            sampling=SamplingParams(temperature=temperature, top_k=top_k, seed=seed),
            max_frames=1,
        )
        for seed in range(draws)
    ]
    drawn = [int(codes[0, 0]) for codes, _, _ in run(engine, *requests).values()]
    counts = torch.tensor([drawn.count(int(code)) for code in kept])
    assert counts.sum() == draws
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 20.5  # the 99.9 % point at 5 degrees of freedom


def test_the_default_context_equals_a_given_one(folder):
    tiny = build_tiny(seed=5)
    context = random_context(tiny.shape)
    plain = load_engine(folder(tiny))
    shared = Engine(plain.model, plain.mimi, plain.prompts, context)
    requests = eight_requests()
    given = run(plain, *(Request(**{**vars(r), "context": context}) for r in requests))
    assert_same(run(shared, *requests), given)
    codes, _, _ = run_one(shared, text="Bare.", context=[], sampling=GREEDY, max_frames=5)
    assert torch.equal(codes, reference_generate(tiny, [Segment(0, "Bare.")], 5))


def test_abort_frees_everything(engine):
    free = engine._cache.num_free_pages
    requests = [*eight_requests(), Request(text="Waits in line.", id="ninth")]
    for request in requests:
        engine.add(request)
    for _ in range(2):
        engine.step()
    assert engine.num_waiting + engine.num_live == 9
    for request in requests:
        engine.abort(request.id)
    engine.abort("unknown")
    assert not engine.has_work
    assert engine.step() == []
    assert engine._cache.num_free_pages == free


def test_texts_are_normalised_as_the_request_or_the_engine_says(engine):
    normalising = Engine(engine.model, engine.mimi, engine.prompts, normalises=True)

    def is_normalised(engine: Engine, normalise: str) -> bool:
        written = Request("[1]It was $5.", normalise=normalise)
        found = engine.prepare(written).frames
        texts = (written.text, "one, It was five dollars.")
        raw, words = (engine.prepare(Request(text, normalise="off")).frames for text in texts)
        assert torch.equal(found, words) != torch.equal(found, raw)
        return torch.equal(found, words)

    for setting, expected in {"on": (True, True), "off": (False, False)}.items():
        assert (is_normalised(engine, setting), is_normalised(normalising, setting)) == expected
    assert (is_normalised(engine, "auto"), is_normalised(normalising, "auto")) == (False, True)
    limit = CHARS_PER_POSITION * engine.model.config.backbone.max_positions
    long = "1" * (limit + 1)
    with pytest.raises(PromptTooLongError, match=f"the text has {limit + 1} characters"):
        normalising.prepare(Request(long))


def test_abort_while_a_frame_is_in_flight(engine, alone, monkeypatch):
    monkeypatch.setitem(engine_module.FRAMES_AHEAD, engine.model.device.type, 1)
    for _ in range(2):
        for request in eight_requests():
            engine.add(request)
        for _ in range(3):
            engine.step()
        for request in eight_requests():
            engine.abort(request.id)
        assert not engine.has_work
    assert_same(run(engine, *eight_requests()), alone)


def test_after_a_failed_step_the_engine_refuses_to_step(engine, monkeypatch):
    broken = Engine(engine.model, engine.mimi, engine.prompts)
    broken.add(Request(text="One.", sampling=GREEDY))
    broken.step()
    with monkeypatch.context() as patch:
        patch.setattr(FrameBatch, "_run_draw", lambda *_: 1 / 0)
        patch.setattr(FrameBatch, "_run", lambda batch, half, rows: batch._run_draw(rows))
        with pytest.raises(ZeroDivisionError):
            broken.step()
    with pytest.raises(RuntimeError, match="failed in an earlier step"):
        broken.step()


def test_a_frame_that_was_given_up_is_an_error(engine, monkeypatch):
    """Codes of -2, as a persistent kernel leaves them when its watchdog ends it."""
    broken = Engine(engine.model, engine.mimi, engine.prompts)
    for name in ("One.", "Two."):
        broken.add(Request(text=name, sampling=GREEDY))
    broken.step()

    def draw(hidden, rows, persistent=False):
        codes = torch.ones(len(hidden), engine.num_codebooks, dtype=torch.int64)
        codes[1, 1:] = -2
        return codes.to(hidden.device)

    monkeypatch.setattr(engine.model, "draw_frames", draw)
    monkeypatch.setattr(
        *(FrameBatch, "_run"), lambda batch, half, rows: batch._functions()[half](rows)
    )
    monkeypatch.setitem(engine_module.FRAMES_AHEAD, engine.model.device.type, 0)
    with pytest.raises(RuntimeError, match="decode_depth's watchdog ended a frame"):
        broken.step()
    with pytest.raises(RuntimeError, match="failed in an earlier step"):
        broken.step()


def test_a_gpu_is_offered_a_persistent_depth_decoder(engine, monkeypatch):
    """Only for native kernels in bfloat16; it draws with the private op: the same codes."""
    persistent_calls, whole = [], model.decode_depth_persistent
    monkeypatch.setattr(
        *(model, "decode_depth_persistent"),
        lambda **kwargs: persistent_calls.append(kwargs) or whole(**kwargs),
    )
    batch = FrameBatch(engine.model, engine.mimi, engine._cache, 4)
    for served, dtype in (("triton", torch.bfloat16), ("native", torch.float32)):
        monkeypatch.setattr(frame_batch, "backend_for", lambda device, op, name=served: name)
        monkeypatch.setattr(engine.model, "dtype", dtype)
        assert batch._alternatives() == []
    monkeypatch.setattr(engine.model, "dtype", torch.bfloat16)
    (other,) = batch._alternatives()
    assert other.replaces == Half.DRAW
    assert other.max_rows == model.PERSISTENT_ROWS
    results = []
    with torch.inference_mode():
        for function in (batch._run_draw, other.function):
            other.prepare(3)
            assert (other.result(3) == -1).all()
            function(3)
            results.append(other.result(3).clone())
            assert len(persistent_calls) == (function == other.function)
    assert torch.equal(*results)
    assert len(results[0].unique()) > 9


def test_every_end_frees_the_pages(engine):
    free = engine._cache.num_free_pages
    run(engine, *eight_requests())
    assert engine._cache.num_free_pages == free


def test_a_full_context_ends_an_utterance(folder):
    tiny = build_tiny(TinyShape(max_positions=40), seed=6)
    engine = load_engine(folder(tiny))
    prompt = len(engine.prompts.tokens(Segment(0, "Long.")))
    codes, _, reason = run_one(engine, text="Long.", sampling=GREEDY)
    assert len(codes) == 40 - prompt
    assert reason == "context"
    assert torch.equal(codes, reference_generate(tiny, [Segment(0, "Long.")], 40 - prompt))


def test_prompt_too_long(folder):
    engine = load_engine(folder(build_tiny(TinyShape(max_positions=40), seed=6)))
    with pytest.raises(PromptTooLongError, match="context of 40"):
        engine.add(Request(text="x" * 100))
    assert not engine.has_work


def test_prompts_may_be_prepared_in_other_threads(engine, alone):
    requests = eight_requests()
    with ThreadPoolExecutor(2) as pool:
        prompts = list(pool.map(engine.prepare, requests))
    assert not engine.has_work
    assert_same(run(engine, *requests, prompts=prompts), alone)


def test_a_waiting_request_has_no_pages(engine):
    """Otherwise a queue of hundreds would take gigabytes."""
    narrow = Engine(engine.model, engine.mimi, engine.prompts, max_batch_size=1)
    free = narrow._cache.num_free_pages
    for request in eight_requests():
        narrow.add(request)
    assert narrow._cache.num_free_pages == free


def test_the_penalty_forgets_what_left_its_window(engine):
    """Within the window no code repeats; beyond it, codes do."""

    def codes(window):
        sampling = SamplingParams(temperature=0, repetition_penalty=100.0, repetition_window=window)
        return run_one(engine, text="Again.", sampling=sampling, max_frames=30)[0][:, 0].tolist()

    for window in (3, 7):
        spoken = codes(window)
        for i in range(len(spoken)):
            recent = spoken[max(0, i - window) : i]
            assert spoken[i] not in recent
        assert len(set(spoken)) < len(spoken)


def test_refuses_an_id_in_use(engine):
    engine.add(Request(text="One.", id="same"))
    with pytest.raises(ValueError, match="'same' is in use"):
        engine.add(Request(text="Two.", id="same"))
    engine.abort("same")


def test_refuses_no_frames(engine):
    with pytest.raises(ValueError, match="max_frames"):
        engine.add(Request(text="None.", max_frames=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_bfloat16_is_invariant_too(folder, dtype):
    engine = load_engine(folder(build_tiny(seed=4)), dtype=dtype)
    alone = {request.id: run(engine, request)[request.id] for request in eight_requests()}
    assert_same(run(engine, *eight_requests()), alone)
