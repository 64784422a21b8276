"""A whole engine on the Triton backend, interpreted on the CPU (TRITON_INTERPRET=1)."""

from functools import partial

import pytest
import torch

from checkpoints import TinyShape, build_tiny
from csm_reference import reference_generate
from emulated_kernels import interpreted_transformers
from engine_testing import GREEDY, run, run_one
from ops_testing import Target
from random_schedules import assert_a_small_schedule_changes_nothing
from vox_serve import loading
from vox_serve.engine import Request
from vox_serve.loading import load_engine
from vox_serve.prompt import Segment
from vox_serve.sampling import SamplingParams
from voxkern.backend import OPS, backend_for, force, forced

pytestmark = pytest.mark.skipif(
    Target("triton", "cpu").why_missing() is not None, reason="runs under TRITON_INTERPRET=1"
)


@pytest.fixture
def on_triton(monkeypatch):
    """A function that puts every op on its Triton kernel. The codec has its GPU precision."""
    precision = partial(loading.codec_precision, "cuda")
    monkeypatch.setattr(loading, "codec_precision", lambda _, *rest: precision(*rest))
    before = forced()
    yield lambda: force("triton")
    force(before)


def test_greedy_codes_equal_transformers(tmp_path, on_triton):
    tiny = build_tiny(seed=1)
    engine = load_engine(str(tiny.write(tmp_path)))
    on_triton()
    assert {backend_for("cpu", op) for op in OPS} == {"triton"}
    context = [Segment(1, "Me.", torch.randint(0, 64, (3, tiny.shape.num_codebooks)))]
    codes, _, _ = run_one(engine, text="Hello.", context=context, sampling=GREEDY, max_frames=3)
    assert torch.equal(codes, reference_generate(tiny, [*context, Segment(0, "Hello.")], 3))


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("float32", "none"), ("bfloat16", "none"), ("float32", "int4")]
)
def test_a_batch_changes_no_code(tmp_path, on_triton, dtype, quantize):
    """Sampled codes do not change either, and in float32 they equal the native kernels'."""
    shape = TinyShape(heads=4, depth_dim=64, depth_kv_heads=2, depth_ffn=96)
    folder = str(build_tiny(shape, seed=4).write(tmp_path))
    engine = load_engine(folder, dtype=getattr(torch, dtype), quantize=quantize)
    parameters = (
        SamplingParams(temperature=0.9, top_k=20, seed=1),
        SamplingParams(top_k=0, top_p=0.9, repetition_penalty=1.3, seed=2),
        SamplingParams(top_k=0, min_p=0.05, seed=3),
    )
    requests = [
        Request("Yes." * (i + 1), sampling=sampling, max_frames=2, id=str(i))
        for i, sampling in enumerate(parameters)
    ]
    native = run(engine, *requests)
    on_triton()
    together = run(engine, *requests)
    if (dtype, quantize) == ("float32", "none"):  # what these codes are alone
        for i, (codes, _, _) in native.items():
            assert torch.equal(together[i][0], codes)
    else:
        alone = run(engine, requests[1])
        assert torch.equal(alone["1"][0], together["1"][0])


def test_random_schedules_change_nothing(tmp_path):
    """Parked, moved to other rows, suspended and rebuilt. The codec, which is slow, is native."""
    assert_a_small_schedule_changes_nothing(tmp_path, interpreted_transformers())
