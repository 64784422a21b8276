"""Whatever a schedule does, every request gets the codes and samples that it gets alone."""

import random
from dataclasses import replace

import pytest

from checkpoints import build_tiny
from emulated_kernels import emulated_gpu
from engine_testing import PACKABLE, run
from random_schedules import (
    assert_a_schedule_changes_nothing,
    assert_a_small_schedule_changes_nothing,
    choose_at_random,
    engine_like,
)
from vox_serve import engine as engine_module
from vox_serve import frame_batch
from vox_serve.engine import Request
from vox_serve.loading import load_engine
from vox_serve.sampling import SamplingParams
from voxkern import backend

SHAPE = replace(PACKABLE, max_positions=90)
PAGES = 6
"""Pages of a request of full length."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    tiny = build_tiny(SHAPE, seed=21)
    return str(tiny.write(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module", params=["float32", "int8", "reference"])
def loaded(folder, request):
    """An engine of each precision, and one of the reference's ops."""
    name, before = request.param, backend.forced()
    quantize = "int8" if name == "int8" else "none"
    engine = load_engine(folder, dtype="float32", quantize=quantize, prefix_cache_bytes=0)
    if name == "reference":
        backend.force("reference")
    yield engine
    backend.force(before)


@pytest.fixture(scope="module")
def requests(loaded) -> list[Request]:
    """Some end at their limit of frames, and some fill the context. The reference is slow."""
    limits = (2, 4, 9) if backend.forced() == "reference" else (2, 30, 40, None)
    return [
        Request(
            f"Number {i}." * (1 + i % 3),
            speaker=i % 2,
            sampling=SamplingParams(
                temperature=(0.0, 0.9)[i % 2], repetition_penalty=1.2, seed=100 + i
            ),
            max_frames=limits[i % len(limits)],
            id=str(i),
        )
        for i in range(4 if backend.forced() == "reference" else 10)
    ]


@pytest.fixture(scope="module")
def alone(loaded, requests) -> dict[str, tuple]:
    return {request.id: run(loaded, request)[request.id] for request in requests}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules_change_nothing(loaded, requests, alone, monkeypatch, seed):
    """Parked, moved to other rows, suspended, rebuilt, beside requests that come and go."""
    monkeypatch.setitem(frame_batch.PADS, "cpu", seed % 2 > 0)
    monkeypatch.setitem(engine_module.FRAMES_AHEAD, "cpu", (0, 1, 1, 3)[seed])
    rng = random.Random(seed)
    engine = engine_like(
        loaded,
        num_pages=(PAGES, 2 * PAGES, PAGES + 3, 6 * PAGES)[seed],
        cached_pages=(0, 50, 2, 0)[seed],
        choose=choose_at_random(rng),
    )
    assert_a_schedule_changes_nothing(
        engine, requests, alone, rng, abort_share=0.02, lose_share=0.15
    )


@pytest.mark.slow
def test_random_schedules_change_nothing_for_cuda_kernels_simt(tmp_path):
    """The kernels run on the emulated GPU."""
    assert_a_small_schedule_changes_nothing(tmp_path, emulated_gpu())


def test_the_pool_has_room_for_one_request_at_least(loaded):
    with pytest.raises(ValueError, match=r"kv_cache_bytes must be at least .* 90 positions"):
        engine_like(loaded, PAGES - 1)
