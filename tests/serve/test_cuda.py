"""The engine, the command line and the server on a GPU, compared with the same on the CPU."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench_backends import bind_backend
from bench_frame import OurFrames, our_model
from csm_1b_shapes import config_for
from timing import GpuTimer

from checkpoints import build_tiny
from engine_testing import (
    GREEDY,
    PACKABLE,
    SHAPES,
    TEXTS,
    random_context,
    run,
    share_of_equal_codes,
)
from vox_serve import say
from vox_serve.audio import pcm16
from vox_serve.engine import Request
from vox_serve.loading import choose_device, load_engine
from vox_serve.model import PERSISTENT_ROWS
from vox_serve.sampling import SamplingParams, SamplingRows
from voxkern.backend import OPS, backend_for, why_missing
from voxkern.persistent import decode_depth_persistent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

NUM_FRAMES = 12


@pytest.fixture(params=["native", "triton"])
def backend(request) -> str:
    """A backend with GPU kernels."""
    if reason := why_missing(request.param, "cuda"):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(build_tiny(seed=5).write(tmp_path_factory.mktemp("checkpoint")))


def requests(sampling, context=()) -> list[Request]:
    return [
        Request(text, 1, context, sampling(i), NUM_FRAMES, id=str(i))
        for i, text in enumerate(TEXTS)
    ]


def spoken(
    folder: str, device: str, asked: list[Request], quantize: str = "none"
) -> dict[str, tuple]:
    """The results of a new float32 engine."""
    engine = load_engine(folder, device=device, dtype="float32", quantize=quantize)
    return run(engine, *asked)


def test_every_op_has_a_kernel(backend):
    """The requested backend serves every op: a frame then fits in one CUDA graph."""
    assert {bind_backend(backend, backend_for)("cuda", op) for op in OPS} == {backend}


@pytest.mark.parametrize("with_context", [False, True], ids=["alone", "with context"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_codes_equal_the_cpus(tmp_path, backend, shape, with_context):
    folder = str(build_tiny(shape, seed=1).write(tmp_path))
    asked = requests(lambda _: GREEDY, random_context(shape) if with_context else [])
    cuda = bind_backend(backend, spoken)(folder, "cuda", asked)
    for name, (codes, audio, reason) in spoken(folder, "cpu", asked).items():
        assert torch.equal(cuda[name][0], codes)
        torch.testing.assert_close(cuda[name][1], audio, atol=1e-4, rtol=0)
        assert cuda[name][2] == reason == "length"


def test_sampled_codes_equal_the_cpus(folder, backend):
    """Equal seeds give equal draws on both devices."""
    asked = requests(lambda i: SamplingParams(seed=i, repetition_penalty=1.2))
    cuda = bind_backend(backend, spoken)(folder, "cuda", asked)
    for name, (codes, _, _) in spoken(folder, "cpu", asked).items():
        assert torch.equal(cuda[name][0], codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_gives_the_same_alone_and_in_a_batch(folder, backend, dtype):
    load, speak = bind_backend(backend, load_engine), bind_backend(backend, run)
    engine = load(folder, device="cuda", dtype=dtype)
    asked = requests(lambda i: SamplingParams(seed=i))
    together = speak(engine, *asked)
    for request in asked:
        alone = speak(engine, request)[request.id]
        assert torch.equal(alone[0], together[request.id][0])
        assert torch.equal(alone[1], together[request.id][1])


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_weights_give_the_cpus_codes(tmp_path, backend, quantize):
    """Up to rounding, for the reason that test_engine.py gives."""
    folder = str(build_tiny(PACKABLE, seed=4).write(tmp_path))
    asked = requests(lambda _: GREEDY)
    cuda = bind_backend(backend, spoken)(folder, "cuda", asked, quantize)
    assert share_of_equal_codes(cuda, spoken(folder, "cpu", asked, quantize)) > 0.95


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_captured_frame_equals_an_eager_one(backend, precision):
    """A frame never waits for the host: it can be captured, and replays give the same codes."""
    model = our_model(config_for(rehearse=True), precision, "cuda")
    timer = GpuTimer()
    frames = OurFrames(model, 3, timer, [backend])
    start = torch.randint_like(frames.codes, 2000)

    def codes(step) -> torch.Tensor:
        frames.codes.copy_(start)
        made = []
        for _ in range(4):
            step()
            made.append(frames.codes.clone())
        return torch.stack(made)

    eager, k_pages = codes(bind_backend(backend, frames.frame)), frames.cache.k_pages.clone()
    replayed = codes(lambda: frames.frames_ms(1))
    assert not timer.without_graph
    assert torch.equal(replayed, eager)
    assert torch.equal(frames.cache.k_pages, k_pages)
    assert not torch.equal(eager[0], eager[1])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("full_size", [False, True], ids=["small", "CSM-1B's"])
def test_the_persistent_depth_decoder_draws_the_same_codes(full_size, precision, temperature):
    """Called directly, and replayed many times from a graph that launches it back to back."""
    if reason := why_missing("native", "cuda"):
        pytest.skip(reason)
    config = config_for(rehearse=not full_size)
    backbone = replace(config.backbone, num_layers=1)
    model = our_model(replace(config, backbone=backbone, text_vocab_size=1), precision, "cuda")
    draw = bind_backend("native", model.draw_frames)
    every = torch.randn(PERSISTENT_ROWS + 1, backbone.dim, device="cuda").to(model.dtype)
    for batch in (1, 3, PERSISTENT_ROWS, PERSISTENT_ROWS + 1):
        hidden = every[:batch]
        sampling = [SamplingParams(temperature=temperature)] * batch
        rows = SamplingRows.of(sampling, range(batch), model.device)
        expected = draw(hidden, rows)
        assert expected.min() >= 0
        assert torch.equal(draw(hidden, rows, persistent=True), expected)
        codes = torch.empty_like(expected)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        graph = torch.cuda.CUDAGraph()
        arguments = model.depth_arguments(hidden, expected[:, 0].contiguous(), rows)
        with torch.cuda.graph(graph):
            codes.copy_(draw(hidden, rows, persistent=True))
            # Back to back: the first kernel of a call may overlap the previous call.
            again = [bind_backend("native", decode_depth_persistent)(**arguments) for _ in range(2)]
        for _ in range(200):
            for made in (codes, *again):
                made.fill_(-1)
            graph.replay()
            for made in (codes, *again):
                wrong += (made != expected).sum()
        assert wrong.item() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_accepts_the_persistent_depth_decoder(folder, caplog, dtype):
    """The engine logs its choice for each number of rows with a graph; float32 has no choice."""
    if reason := why_missing("native", "cuda"):
        pytest.skip(reason)
    caplog.set_level("INFO", "vox_serve")
    bind_backend("native", load_engine)(folder, device="cuda", dtype=dtype, max_batch_size=12)
    said = [line for line in caplog.messages if line.startswith("persistent depth decoder")]
    assert [line.split(":")[0] for line in said] == [
        f"persistent depth decoder, {rows} rows"
        for rows in ((8, 4, 2, 1) if dtype == "bfloat16" else ())
    ]
    assert not [line for line in said if "left out" in line]


def test_say_gives_the_same_codes_on_gpu_and_cpu(folder, tmp_path):
    said = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.npy"
        line = ["--model", folder, "--device", device, "--dtype", "float32", "--greedy"]
        wav = ["-o", str(tmp_path / "out.wav")]
        assert say.main(["Hello.", *line, *wav, "--max_frames", "6", "--codes", str(path)]) == 0
        said.append(np.load(path))
    assert len(said[0]) == 6
    assert said[0].tolist() == said[1].tolist()


def test_a_gpu_is_the_default_device(folder):
    assert choose_device() == "cuda"
    assert load_engine(folder, device="cuda").model.dtype == torch.bfloat16


def test_the_server_speaks_what_the_engine_speaks(folder):
    for module in ("fastapi", "uvicorn", "python_multipart"):
        pytest.importorskip(module)
    from live_server import LiveServer

    engine, alone = (load_engine(folder, device="cuda", max_batch_size=3) for _ in range(2))
    bodies = [{"text": t, "seed": i, "streaming": i % 2 == 0} for i, t in enumerate(TEXTS)]
    with (
        LiveServer(engine, max_frames=NUM_FRAMES) as server,
        ThreadPoolExecutor(len(bodies)) as pool,
    ):
        answers = list(pool.map(lambda body: server.post(**body).read(), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        sampling = SamplingParams(seed=body["seed"])
        request = Request(body["text"], sampling=sampling, max_frames=NUM_FRAMES, id="alone")
        audio = run(alone, request)["alone"][1]
        assert answer[44:] == pcm16(audio.numpy()).tobytes()
