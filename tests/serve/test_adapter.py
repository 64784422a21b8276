"""LoRA adapters, merged at load, against peft's merge."""

import copy
from dataclasses import replace

import pytest
import torch

from adapters import TABLES, edit_config, edit_tensors, merged_tiny, write_adapter
from checkpoints import build_tiny
from csm_reference import reference_generate
from engine_testing import GREEDY, PACKABLE, run_one
from vox_serve import adapter
from vox_serve.loading import cache_folders, load_engine
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import Segment
from vox_serve.tensor_keys import rotary_width, tensor_keys
from vox_serve.tensor_names import HF, ORIGINAL
from vox_serve.weights import load_checkpoint

PEFT = pytest.importorskip("peft", reason="no peft to compare with")

SETTINGS = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16},
    "every linear layer": {"lora_alpha": 32},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3, "r": 5},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"backbone_model.layers.\d.mlp.up_proj": 7},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 40, "down_proj": 0.5, r".*\.k_proj": 1},
    },
    "heads": {"target_modules": ["lm_head", "inputs_embeds_projector"]},
    "heads with embeddings": {"target_modules": ["lm_head"], "save_embedding_layers": True},
    "embeddings": {"target_modules": TABLES},
    "whole modules": {"modules_to_save": ["lm_head", "codebooks_head", "embed_text_tokens"]},
    "an audio table": {"modules_to_save": ["depth_decoder.model.embed_tokens"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "an expression": {"target_modules": r"backbone_model.*\.(q_proj|o_proj)"},
}


def assert_same_weights(got, expected) -> None:
    expected = expected.named()
    for name, tensor in got.named().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_merging_is_pefts_to_the_bit(settings, tmp_path):
    tiny = build_tiny(tied=False)
    folder = write_adapter(tiny, tmp_path / "adapter", **settings)
    merged = merged_tiny(tiny, folder)
    expected = load_checkpoint(merged.write(tmp_path / "merged"), torch.float32)
    base = tiny.write(tmp_path / "base")
    loaded = load_checkpoint(base, torch.float32, adapter=folder)
    assert_same_weights(loaded.weights, expected.weights)
    plain = load_checkpoint(base, torch.float32).weights.named()
    assert any(not torch.equal(t, plain[n]) for n, t in loaded.weights.named().items())


@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_sum_has_the_bases_dtype(adapter_dtype, base_dtype, tmp_path):
    tiny = build_tiny(tied=False)
    settings = {
        "target_modules": rf"({TABLES}|.*_proj|lm_head)",
        "exclude_modules": "codec_model.*",
    }
    folder = write_adapter(tiny, tmp_path / "adapter", adapter_dtype, **settings)
    base = tiny.write(tmp_path / "base", dtype=base_dtype)
    merged = merged_tiny(tiny, folder, base_dtype).write(tmp_path / "merged", dtype=base_dtype)
    loaded = load_checkpoint(base, torch.float32, adapter=folder)
    assert_same_weights(loaded.weights, load_checkpoint(merged, torch.float32).weights)


@pytest.mark.parametrize("layout", ["sharded", "original"])
@pytest.mark.parametrize("name", ["every linear layer", "embeddings", "an audio table"])
def test_bases_of_both_formats(layout, name, tmp_path):
    """The adapter has transformers' order of rotary rows and one or two audio tables."""
    tiny = build_tiny()
    folder = write_adapter(tiny, tmp_path / "adapter", **SETTINGS[name])
    base = tiny.write(tmp_path / "base", layout)
    expected = merged_tiny(build_untied(tiny), folder)
    written = expected.write(tmp_path / "merged", "hf")
    loaded = load_checkpoint(base, torch.float32, adapter=folder)
    assert_same_weights(loaded.weights, load_checkpoint(written, torch.float32).weights)


def build_untied(tiny):
    """The same model, whose two equal audio tables are two parameters."""
    model = copy.deepcopy(tiny.model)
    table = model.depth_decoder.model.embed_tokens
    table.weight = torch.nn.Parameter(table.weight.clone(), requires_grad=False)
    return replace(tiny, model=model)


@pytest.mark.parametrize("tables", ["backbone", "depth"])
def test_a_base_with_one_audio_table(tables, tmp_path):
    tiny = build_untied(build_tiny())
    folder = write_adapter(tiny, tmp_path / "adapter", **SETTINGS["an audio table"])
    base = tiny.write(tmp_path / "base", audio_tables=tables)
    written = merged_tiny(tiny, folder).write(tmp_path / "merged")
    loaded = load_checkpoint(base, torch.float32, adapter=folder)
    assert_same_weights(loaded.weights, load_checkpoint(written, torch.float32).weights)


def test_tied_audio_tables_get_their_own_changes(tmp_path):
    """Where the tables are one parameter, peft's merge adds both changes to both, and then says
    something else than its model before the merge."""
    tiny = build_tiny()
    table = tiny.model.depth_decoder.model.embed_tokens.weight
    assert tiny.model.backbone_model.embed_tokens.embed_audio_tokens.weight is table
    folder = write_adapter(tiny, tmp_path / "adapter", **SETTINGS["embeddings"])
    model = PEFT.PeftModel.from_pretrained(copy.deepcopy(tiny.model), folder).eval()
    unmerged = replace(tiny, model=model.base_model.model)
    engine = load_engine(tiny.write(tmp_path / "base"), adapter=str(folder), dtype="float32")
    codes, _, _ = run_one(engine, text="hello there", sampling=GREEDY, max_frames=6)
    assert torch.equal(codes, reference_generate(unmerged, [Segment(0, "hello there")], 6))


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_the_engine_says_what_the_merged_model_says(layout, tmp_path):
    tiny = build_tiny()
    folder = write_adapter(tiny, tmp_path / "adapter", lora_alpha=16)
    codec = "inside" if layout == "hf" else "mimi"
    base = tiny.write(tmp_path / "base", layout, codec=codec)
    engine = load_engine(base, adapter=str(folder), dtype="float32")
    text = [Segment(0, "hello there")]
    expected = reference_generate(merged_tiny(tiny, folder), text, 6)
    assert not torch.equal(expected, reference_generate(tiny, text, 6))
    codes, _, _ = run_one(engine, text="hello there", sampling=GREEDY, max_frames=6)
    assert torch.equal(codes, expected)


def test_names_of_other_trainers(tmp_path):
    """Names without peft's prefix, with the adapter's name, and with those of torch.compile."""
    tiny = build_tiny()
    folder = write_adapter(tiny, tmp_path / "adapter")
    base = tiny.write(tmp_path / "base")
    expected = load_checkpoint(base, torch.float32, adapter=folder).weights

    def renamed(tensors):
        names = iter(tensors)
        out = {next(names): tensors[next(iter(tensors))]}
        for i, name in enumerate(names):
            short = name.removeprefix("base_model.model.")
            named = name.replace("lora_A.weight", "lora_A.default.weight")
            compiled = name.replace("base_model.model.", "base_model.model._orig_mod.")
            out[(short, named, compiled)[i % 3]] = tensors[name]
        return out

    edit_tensors(folder, renamed)
    assert_same_weights(load_checkpoint(base, torch.float32, adapter=folder).weights, expected)


def test_an_adapter_of_the_original_format(tmp_path):
    """peft on Sesame's own modules, whose rotary rows are interleaved."""
    tiny = build_tiny()
    config = CsmConfig.from_json(tiny.config)
    folder = write_adapter(tiny, tmp_path / "adapter")
    bases = [tiny.write(tmp_path / layout, layout) for layout in ("hf", "original")]
    expected = [load_checkpoint(base, torch.float32, adapter=folder) for base in bases]
    hf, original = tensor_keys(HF, config), tensor_keys(ORIGINAL, config)
    names = {hf[key].removesuffix(".weight"): (key, original[key]) for key in hf}

    def converted(tensors):
        out = {}
        for name, tensor in tensors.items():
            module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
            if module.startswith("codec_model."):
                continue
            key, other = names[module]
            width = rotary_width(key, config)
            if width and factor.startswith("B"):
                halves = tensor.view(-1, 2, width // 2, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
            out[f"base_model.model.{other.removesuffix('.weight')}.lora_{factor}"] = tensor
        return out

    edit_tensors(folder, converted)
    edit_config(folder, target_modules=["q_proj", "w1"])
    for base, same in zip(bases, expected, strict=True):
        loaded = load_checkpoint(base, torch.float32, adapter=folder)
        assert_same_weights(loaded.weights, same.weights)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_weights_are_those_of_the_merged_model(quantize, tmp_path):
    tiny = build_tiny(PACKABLE)
    folder = write_adapter(tiny, tmp_path / "adapter")
    merged = merged_tiny(tiny, folder).write(tmp_path / "merged")
    expected = load_checkpoint(merged, torch.float32, quantize=quantize)
    base = tiny.write(tmp_path / "base")
    loaded = load_checkpoint(base, torch.float32, quantize=quantize, adapter=folder)
    assert_same_weights(loaded.weights, expected.weights)


def test_the_cache_of_packed_weights_knows_the_adapter(tmp_path):
    tiny = build_tiny(PACKABLE)
    base = tiny.write(tmp_path / "base")
    first = write_adapter(tiny, tmp_path / "first")
    second = write_adapter(tiny, tmp_path / "second")

    def load(adapter):
        caches = cache_folders(None, base, False, adapter)[:1]
        return load_checkpoint(
            base, torch.float32, quantize="int8", cache_folders=caches, adapter=adapter
        ).weights.named()

    def plain(adapter):
        return load_checkpoint(base, torch.float32, quantize="int8", adapter=adapter).weights

    folders = (None, first, second)
    for folder in (*folders, *folders):  # then from the caches
        for name, tensor in load(folder).items():
            assert torch.equal(tensor, plain(folder).named()[name])
    assert len(list((base / ".voxkern").rglob("*.safetensors"))) == 3
    edit_tensors(second, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    for name, tensor in load(second).items():
        assert torch.equal(tensor, plain(second).named()[name])


def test_large_products_come_in_pieces(tmp_path, monkeypatch):
    tiny = build_tiny(tied=False)
    settings = {"target_modules": rf"({TABLES}|.*_proj)", "exclude_modules": "codec_model.*"}
    folder = write_adapter(tiny, tmp_path / "adapter", **settings)
    base = tiny.write(tmp_path / "base")
    expected = load_checkpoint(base, torch.float32, adapter=folder).weights.named()
    monkeypatch.setattr(adapter, "PIECE_ELEMENTS", 1000)
    for name, tensor in (
        load_checkpoint(base, torch.float32, adapter=folder).weights.named().items()
    ):
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
