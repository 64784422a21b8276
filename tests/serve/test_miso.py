"""MisoTTS: its sizes, its way of writing prompts, and its codes, against a plain reference."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import miso_reference
from checkpoints import build_tiny
from engine_testing import GREEDY, run_one
from miso_reference import SHAPE, MisoReference
from vox_serve import models
from vox_serve.checkpoint import CheckpointError
from vox_serve.checkpoint_settings import read_settings
from vox_serve.csm_weights import CsmWeights, TransformerWeights
from vox_serve.loading import load_engine
from vox_serve.model_config import FLAVORS, CsmConfig
from vox_serve.prompt import PromptBuilder, Segment
from vox_serve.weights import load_checkpoint

MISO_8B = {
    "backbone_flavor": "llama-8B",
    "decoder_flavor": "llama-300M",
    "text_vocab_size": 128256,
    "audio_vocab_size": 2051,
    "audio_num_codebooks": 32,
}


@pytest.fixture
def tiny():
    return build_tiny(SHAPE)


@pytest.fixture
def small_flavors(monkeypatch):
    """The names of the published sizes stand for small ones."""
    s = SHAPE
    sizes = miso_reference.flavor(s.layers, s.dim, s.heads, s.kv_heads, s.ffn)
    monkeypatch.setitem(FLAVORS, "llama-8B", sizes)
    parts = (s.depth_layers, s.depth_dim, s.depth_heads, s.depth_kv_heads, s.depth_ffn)
    monkeypatch.setitem(FLAVORS, "llama-300M", miso_reference.flavor(*parts))


def write(tiny, folder):
    """A small model in the published layout, and the codec beside it."""
    tiny.write(folder, "original", codec="mimi")
    (folder / "config.json").write_text(json.dumps(miso_reference.settings(tiny)))
    return folder


def renamed_for_mlx(folder):
    """The same tensors under the names of conversions for MLX, below `model.`."""
    layer = {
        "attn.": "self_attn.",
        "output_proj": "o_proj",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.down_proj",
        "mlp.w3": "mlp.up_proj",
        "sa_norm.scale": "input_layernorm.weight",
        "mlp_norm.scale": "post_attention_layernorm.weight",
        "norm.scale": "norm.weight",
    }
    path = folder / "model.safetensors"
    out = {}
    for name, tensor in load_file(path).items():
        for old, new in layer.items():
            name = name.replace(old, new)
        out[f"model.{name}"] = tensor
    save_file(out, path)
    return folder


def assert_speaks_as_the_reference(tiny, folder, **settings):
    engine = load_engine(folder, dtype="float32", **settings)
    context = [Segment(1, " Who is it?", torch.randint(0, 64, (3, SHAPE.num_codebooks)))]
    for text in ("hello there", "  the fox"):
        segments = [*context, Segment(0, text)]
        expected = MisoReference(tiny).generate(segments, 4)
        codes, _, _ = run_one(engine, text=text, context=context, sampling=GREEDY, max_frames=4)
        assert torch.equal(codes, expected)
        assert len(codes.unique()) > 10


@pytest.mark.parametrize("layout", ["original", "mlx"])
def test_codes_are_those_of_a_plain_reference(tiny, layout, tmp_path):
    folder = write(tiny, tmp_path)
    if layout == "mlx":
        renamed_for_mlx(folder)
    assert_speaks_as_the_reference(tiny, folder)


def test_without_config_and_tokenizer(tiny, small_flavors, tmp_path):
    """The published repository has weights alone."""
    folder = write(tiny, tmp_path / "model")
    (folder / "config.json").unlink()
    (tmp_path / "tokenizer").mkdir()
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer" / "tokenizer.json")
    assert read_settings(folder)["backbone_flavor"] == "llama-8B"
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json: .* --tokenizer"):
        load_engine(folder, dtype="float32")
    assert_speaks_as_the_reference(tiny, folder, tokenizer=str(tmp_path / "tokenizer"))


def test_inspect(tiny, small_flavors, tmp_path, capsys):
    folder = write(tiny, tmp_path)
    renamed_for_mlx(folder)
    (folder / "config.json").unlink()
    assert models.main(["inspect", str(folder), "--json", "--bandwidth", "10"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["what"] == "MisoTTS in safetensors, MLX's names"
    sizes = "no config.json: its tensors have the sizes of llama-8B and llama-300M"
    assert sizes in found["notes"]


def test_unknown_sizes_without_config(tiny, tmp_path):
    folder = write(tiny, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json, and 4 layers of width 128 in"):
        load_checkpoint(folder, torch.float32)


def test_prompts(tiny):
    config = CsmConfig.from_json(miso_reference.settings(tiny))
    miso = PromptBuilder(tiny.tokenizer, config).tokens(Segment(3, "  hi "))
    csm = PromptBuilder(tiny.tokenizer, CsmConfig.from_json(tiny.config))
    assert miso == csm.tokens(Segment(3, " hi "))
    with pytest.raises(ValueError, match="spaced_prompts must be true or false, got 1"):
        CsmConfig.from_json({"spaced_prompts": 1})
    assert CsmConfig.from_json({"spaced_prompts": True}).has_spaced_prompts
    assert not CsmConfig.from_json(MISO_8B | {"spaced_prompts": False}).has_spaced_prompts


def test_published_sizes():
    config = CsmConfig.from_json(MISO_8B)
    assert config.has_spaced_prompts
    assert config.backbone.head_dim == 128
    assert config.depth.head_dim == 64
    assert config.backbone.rope_theta == config.depth.rope_theta == 500_000
    assert config.backbone.rope_scaling.factor == 32
    shapes = CsmWeights.shapes(config)
    del shapes["depth_audio_rows"]  # computed at load
    parts = {
        "backbone": TransformerWeights.shapes(config.backbone),
        "depth": TransformerWeights.shapes(config.depth),
        "other": shapes,
    }
    num = {
        part: sum(torch.Size(shape).numel() for shape in found.values())
        for part, found in parts.items()
    }
    assert num["backbone"] + shapes["text_table"][0] * 4096 == pytest.approx(7.5e9, rel=0.01)
    assert num["depth"] == pytest.approx(0.30e9, rel=0.03)
    assert 4 * sum(num.values()) == pytest.approx(32.8e9, rel=0.002)  # its float32 file
