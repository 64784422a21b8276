"""After a step that failed, `Engine.reset` makes the engine as good as new."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints import TinyShape, build_tiny
from engine_testing import GREEDY, random_context, run
from vox_serve import engine as engine_module
from vox_serve.engine import Engine, Request
from vox_serve.frame_batch import FrameBatch
from vox_serve.loading import load_engine
from vox_serve.model import CsmModel
from vox_serve.prompt import Segment
from vox_serve.sampling import SamplingParams


class BrokenError(RuntimeError):
    """The planted fault."""


class FailAt(TorchDispatchMode):
    """Raises in place of the torch op of this index; -1 only counts them."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 == self.index:
            raise BrokenError
        return function(*args, **(kwargs or {}))


def requests() -> list[Request]:
    """Four requests whose ends differ; the last has a context of its own."""
    sampled = SamplingParams(temperature=0.9, repetition_penalty=1.2, seed=7)
    return [
        Request("One.", sampling=GREEDY, max_frames=2, id="0"),
        Request("Two, two.", speaker=1, sampling=sampled, max_frames=6, id="1"),
        Request("Three.", sampling=sampled, max_frames=5, id="2"),
        Request("Four.", context=[Segment(1, "Who?")], sampling=sampled, max_frames=4, id="3"),
    ]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Engine:
    tiny = build_tiny(TinyShape(), seed=4)
    loaded = load_engine(str(tiny.write(tmp_path_factory.mktemp("checkpoint"))))
    return Engine(
        loaded.model, loaded.mimi, loaded.prompts, random_context(tiny.shape), max_batch_size=3
    )


@pytest.fixture(scope="module")
def expected(fresh) -> dict[str, tuple]:
    return run(fresh, *requests())


def same_as_new(fresh: Engine) -> Engine:
    """Another engine with the same weights and context."""
    parts = fresh.model, fresh.mimi, fresh.prompts, fresh.default_context
    return Engine(*parts, max_batch_size=3)


def check_as_new(engine: Engine, expected: dict[str, tuple], free_pages: int) -> None:
    assert (engine.num_live, engine.num_waiting, engine.has_work) == (0, 0, False)
    assert engine._cache.num_free_pages == free_pages
    spoken = run(engine, *requests())
    for i, (codes, audio, reason) in expected.items():
        assert torch.equal(spoken[i][0], codes), i
        assert torch.equal(spoken[i][1], audio), i
        assert spoken[i][2] == reason
    assert engine._cache.num_free_pages == free_pages


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_fault_anywhere_in_a_step_is_forgotten(fresh, expected, steps):
    """Step 0 finds the context and prefills, 1 ends a request, 3 admits the one that waited."""
    engine = same_as_new(fresh)
    free_pages = engine._cache.num_free_pages

    def begin() -> None:
        for request in requests():
            engine.add(request)
        for _ in range(steps):
            engine.step()

    check_as_new(engine, expected, free_pages)  # the first steps also make views that are kept
    begin()
    with FailAt(-1) as counter:
        engine.step()
    engine.reset()
    for index in range(0, counter.count, max(1, counter.count // 24)):
        begin()
        with pytest.raises(BrokenError), FailAt(index):
            engine.step()
        with pytest.raises(RuntimeError, match="failed in an earlier step"):
            engine.step()
        engine.reset()
        assert engine._cache.num_free_pages == free_pages
    check_as_new(engine, expected, free_pages)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (CsmModel, "backbone_step"),
        (CsmModel, "draw_frames"),
        (FrameBatch, "join"),
        (FrameBatch, "leave"),
    ],
)
def test_a_fault_between_ops_is_forgotten(fresh, expected, owner, name, monkeypatch):
    engine = same_as_new(fresh)
    free_pages = engine._cache.num_free_pages
    original = getattr(owner, name)

    def fail_after(*args):
        original(*args)
        raise BrokenError

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_after)
        with pytest.raises(BrokenError):
            run(engine, *requests())
    engine.reset()
    check_as_new(engine, expected, free_pages)


def test_ruined_contents_are_replaced(fresh, expected):
    """A fault may leave any numbers in the cache, the shared prefix and the batch's tensors."""
    engine = same_as_new(fresh)
    free_pages = engine._cache.num_free_pages
    for request in requests():
        engine.add(request)
    engine.step()
    batch, nan = engine._batch, float("nan")
    with torch.inference_mode():
        for tensor in (engine._cache.k_pages, engine._cache.v_pages, batch._hidden, batch._audio):
            tensor.fill_(nan)
        for tensor in (*batch._streams[1:3], *batch._streams.lefts):
            tensor.fill_(nan)
        batch._codes.fill_(-1)
        batch._streams.positions.fill_(10**6)
    engine.reset()
    check_as_new(engine, expected, free_pages)


def test_a_reset_that_fails_leaves_the_engine_failed(fresh, expected):
    engine = same_as_new(fresh)
    with pytest.raises(BrokenError), FailAt(0):
        engine.reset()
    with pytest.raises(RuntimeError, match="failed in an earlier step"):
        engine.step()
    engine.reset()
    check_as_new(engine, expected, engine._cache.num_free_pages)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_healthy_engine_can_be_reset(fresh, expected, ahead, monkeypatch):
    """Requests and frames in flight are dropped; new requests may have their ids."""
    device = fresh.model.device.type
    monkeypatch.setitem(engine_module.FRAMES_AHEAD, device, ahead)
    engine = same_as_new(fresh)
    free_pages = engine._cache.num_free_pages
    engine.reset()
    for request in requests():
        engine.add(request)
    engine.step()
    engine.reset()
    check_as_new(engine, expected, free_pages)
