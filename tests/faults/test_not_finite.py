"""NaN and infinity end one request with an error; they never become noise or silence."""

import pytest
import torch

from checkpoints import TinyShape, build_tiny
from engine_testing import run
from vox_serve import engine as engine_module
from vox_serve.engine import Engine, Request
from vox_serve.frame_batch import FrameBatch
from vox_serve.loading import load_engine
from vox_serve.sampling import SamplingParams

NAN, INF = float("nan"), float("inf")
REASON = "the model produced numbers that are not finite"


def requests() -> list[Request]:
    """Four requests, greedy and sampled, of which "2" is the one to be ruined."""
    return [
        Request(
            f"Number {i}.",
            sampling=SamplingParams(temperature=0.9 * (i % 2), repetition_penalty=1.1, seed=i),
            max_frames=4 + i,
            id=str(i),
        )
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    tiny = build_tiny(TinyShape(), seed=4)
    return load_engine(str(tiny.write(tmp_path_factory.mktemp("checkpoint"))))


@pytest.fixture(scope="module")
def expected(engine) -> dict[str, tuple]:
    return run(engine, *requests())


def run_ruined(engine: Engine, monkeypatch, ruin) -> dict[str, list]:
    """Outputs by request while `ruin(batch, row)` is called before frame 2 of request "2"."""
    original = FrameBatch._run_draw

    def draw(batch, rows, persistent=False):
        for row, live in enumerate(batch.members):
            if live.request.id == "2" and live.num_begun == 2:
                ruin(batch, row)
        original(batch, rows, persistent)

    outputs = {request.id: [] for request in requests()}
    with monkeypatch.context() as patch:
        patch.setattr(FrameBatch, "_run_draw", draw)
        for request in requests():
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                outputs[output.request_id].append(output)
    return outputs


def ruin_hidden(value: float):
    def ruin(batch, row):
        batch._hidden[row, 3] = value

    return ruin


def ruin_codec_state(value: float):
    def ruin(batch, row):
        batch._streams.lefts[0][row] = value

    return ruin


def ruin_cache(value: float):
    """Takes effect a frame later, in the backbone's attention."""

    def ruin(batch, row):
        live = batch.members[row]
        batch.cache.v_pages[0, live.cache.pages[0], :, 0] = value

    return ruin


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", [ruin_hidden, ruin_codec_state, ruin_cache])
def test_one_request_fails_and_its_neighbours_do_not_notice(
    engine, expected, monkeypatch, kind, value, ahead
):
    monkeypatch.setitem(engine_module.FRAMES_AHEAD, "cpu", ahead)
    free_pages = engine._cache.num_free_pages
    outputs = run_ruined(engine, monkeypatch, kind(value))
    *spoken, end = outputs.pop("2")
    assert (end.codes, end.audio, end.finish_reason, end.error) == (None, None, "error", REASON)
    assert len(spoken) == (3 if kind is ruin_cache else 2)
    for frame, output in enumerate(spoken):
        assert torch.equal(output.codes, expected["2"][0][frame])
        assert output.finish_reason is None
    for i, mine in outputs.items():
        codes, audio, reason = expected[i]
        assert torch.equal(torch.stack([output.codes for output in mine]), codes)
        assert torch.equal(torch.cat([torch.from_numpy(output.audio) for output in mine]), audio)
        assert (mine[-1].finish_reason, mine[-1].error) == (reason, None)
    assert engine._cache.num_free_pages == free_pages
    # Rows, pages and streams that held the numbers serve again.
    again = run(engine, *requests())
    assert all(torch.equal(again[i][1], expected[i][1]) for i in expected)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["code0_head", "code_heads"])
def test_logits_are_checked_in_every_codebook(engine, expected, name, value):
    """The first and last head that a frame uses; checks at load time cannot see an overflow."""
    weight = getattr(engine.model.weights, name)
    place = (3,) if name == "code0_head" else (len(weight) - 1, slice(None), 3)
    kept = weight[place].clone()
    with torch.inference_mode():
        weight[place] = value
    try:
        for request in requests():
            engine.add(request)
        outputs = [output for _ in range(2) for output in engine.step()]
    finally:
        with torch.inference_mode():
            weight[place] = kept
    assert [output.request_id for output in outputs] == ["0", "1", "2", "3"]
    assert {(output.finish_reason, output.error) for output in outputs} == {("error", REASON)}
    assert not engine.has_work
    again = run(engine, *requests())
    assert all(torch.equal(again[i][0], expected[i][0]) for i in expected)
