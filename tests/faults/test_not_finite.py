"""NaN and infinity end one request with an error; they never become noise or silence."""

from dataclasses import replace

import pytest
import torch
from starlette.testclient import TestClient

from checkpoints import TinyShape, build_tiny
from engine_testing import PACKABLE, run
from vox_serve import engine as engine_module
from vox_serve import say
from vox_serve.api import create_app
from vox_serve.checkpoint import CheckpointError
from vox_serve.config import Config
from vox_serve.engine import Engine, Request
from vox_serve.frame_batch import FrameBatch
from vox_serve.loading import load_engine
from vox_serve.runner import Runner
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


# At load time. A number that is not finite is found wherever it lies, in any layout and packing.

TENSORS = [
    "lm_head.weight",
    "embed_text_tokens.weight",
    "backbone_model.embed_tokens.embed_audio_tokens.weight",
    "backbone_model.layers.1.self_attn.k_proj.weight",
    "backbone_model.layers.0.input_layernorm.weight",
    "backbone_model.norm.weight",
    "depth_decoder.codebooks_head.weight",
    "depth_decoder.model.layers.0.mlp.up_proj.weight",
    "depth_decoder.model.inputs_embeds_projector.weight",
    "codec_model.decoder.layers.0.conv.weight",
    "codec_model.quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum",
]


def ruined(shape: TinyShape, name: str, value: float, index: int = -1):
    """A tiny checkpoint with a bad number in one tensor."""
    tiny = build_tiny(shape, seed=4)
    tensor = tiny.tensors[name].clone()
    tensor.view(-1)[index] = value
    return replace(tiny, tensors={**tiny.tensors, name: tensor})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", TENSORS)
def test_weights_are_checked_when_they_are_read(tmp_path, name, value):
    folder = ruined(TinyShape(), name, value).write(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_engine(str(folder))
    file = folder / "model.safetensors"
    assert str(error.value) == f"tensor {name} in {file} holds NaN or infinity"


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_weights_are_checked_by_their_own_names(tmp_path, quantize):
    name = "depth_decoder.model.layers.0.mlp.down_proj.weight"
    folder = ruined(PACKABLE, name, NAN, index=5).write(tmp_path)
    for _ in range(2):  # the second time, there might be a cache
        with pytest.raises(CheckpointError, match=f"tensor {name} in .*model.safetensors holds"):
            load_engine(str(folder), quantize=quantize, weight_cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("layout", "name", "said"),
    [
        ({"layout": "sharded"}, "lm_head.weight", r"lm_head.weight in .*\.safetensors holds NaN"),
        (
            {"layout": "original", "codec": "mimi"},
            "backbone_model.layers.0.self_attn.q_proj.weight",
            "backbone.layers.0.attn.q_proj.weight in .*model.safetensors holds NaN",
        ),
        (
            {"layout": "pickle", "codec": "mimi"},
            "lm_head.weight",
            "codebook0_head.weight in .*ckpt.pt holds NaN",
        ),
        (
            {"codec": "mimi"},
            "codec_model.decoder.layers.0.conv.bias",
            "decoder.layers.0.conv.bias in .*mimi.safetensors holds NaN",
        ),
    ],
    ids=str,
)
def test_every_layout_is_checked(tmp_path, layout, name, said):
    folder = ruined(TinyShape(), name, NAN).write(tmp_path, **layout)
    with pytest.raises(ValueError, match=f"^tensor {said}"):
        load_engine(str(folder), allow_pickle=True)


def test_a_number_that_overflows_in_the_chosen_dtype(tmp_path):
    folder = ruined(TinyShape(), "lm_head.weight", 3.4e38).write(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_engine(str(folder), dtype="bfloat16")
    said = f"tensor lm_head.weight in {folder / 'model.safetensors'} has values beyond the range"
    assert str(error.value) == f"{said} of bfloat16"


def test_the_projected_audio_rows_are_checked(tmp_path):
    table = "depth_decoder.model.embed_tokens.weight"
    tiny = build_tiny(seed=4)
    large = {table: 1e38, "depth_decoder.model.inputs_embeds_projector.weight": 1.0}
    ruined = {name: torch.full_like(tiny.tensors[name], value) for name, value in large.items()}
    folder = replace(tiny, tensors={**tiny.tensors, **ruined}).write(tmp_path)
    with pytest.raises(CheckpointError, match=rf"the product of tensors \S+ and {table} in"):
        load_engine(str(folder))


def test_a_command_says_it_in_one_line(tmp_path, capsys):
    folder = ruined(TinyShape(), "lm_head.weight", NAN).write(tmp_path)
    capsys.readouterr()
    assert say.main(["Hello.", "--model", str(folder), "-o", str(tmp_path / "out.wav")]) == 1
    said = f"say: error: tensor lm_head.weight in {folder / 'model.safetensors'} holds NaN"
    assert capsys.readouterr().err == f"{said} or infinity\n"
    assert not (tmp_path / "out.wav").exists()


def test_an_overflow_while_speaking_fails_a_command_in_one_line(tmp_path, capsys):
    """Finite weights whose products are not."""
    tiny = build_tiny(seed=4)
    head = torch.full_like(tiny.tensors["lm_head.weight"], 3e38)
    folder = replace(tiny, tensors={**tiny.tensors, "lm_head.weight": head}).write(tmp_path)
    capsys.readouterr()
    assert say.main(["Hello.", "--model", str(folder), "-o", str(tmp_path / "out.wav")]) == 1
    assert capsys.readouterr().err == f"say: error: {REASON}\n"
    assert not (tmp_path / "out.wav").exists()


def test_the_server_answers_500_with_the_reason_and_counts_it(tmp_path):
    tiny = build_tiny(seed=4)
    head = torch.full_like(tiny.tensors["lm_head.weight"], 3e38)
    folder = replace(tiny, tensors={**tiny.tensors, "lm_head.weight": head}).write(tmp_path)
    runner = Runner(load_engine(str(folder)), 8)
    with TestClient(create_app(runner, Config(), {})) as client:
        for _ in range(2):
            answer = client.post("/generate", json={"text": "Hello there."})
            assert (answer.status_code, answer.json()) == (500, {"detail": REASON})
        assert runner.counts.non_finite == 2
        assert client.get("/health").status_code == 200
