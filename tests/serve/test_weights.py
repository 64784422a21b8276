"""Checkpoint folders in every layout, compared with the transformers model they were made from."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import TinyShape, build_tiny, original_tensors
from vox_serve.checkpoint import CheckpointError, weights_entry
from vox_serve.csm_weights import MATRICES, PACKINGS, CsmWeights
from vox_serve.hub import ModelNotFoundError
from vox_serve.model_config import CsmConfig
from vox_serve.weights import load_checkpoint, load_codec
from voxkern import ops
from voxkern.quantize import pack, unpack

SHAPES = {
    "default": TinyShape(),
    "wide heads": TinyShape(num_codebooks=8, heads=4, kv_heads=4, head_dim=32, depth_kv_heads=2),
    "32 codebooks": TinyShape(num_codebooks=32, layers=3, depth_layers=1, kv_heads=1),
}


def transformers_weights(tiny) -> dict[str, torch.Tensor]:
    """The expected stacked tensors, made from the tensors of transformers' file.

    "depth_audio_rows" has not yet gone through the projection.
    """
    tensors, shape = tiny.tensors, tiny.shape
    out = {
        "text_table": tensors["embed_text_tokens.weight"],
        "audio_table": tensors["backbone_model.embed_tokens.embed_audio_tokens.weight"],
        "depth_audio_rows": tensors["depth_decoder.model.embed_tokens.weight"],
        "code0_head": tensors["lm_head.weight"],
        "projection": tensors["depth_decoder.model.inputs_embeds_projector.weight"],
        "code_heads": tensors["depth_decoder.codebooks_head.weight"].transpose(1, 2),
    }
    for name, prefix, num_layers in (
        ("backbone", "backbone_model", shape.layers),
        ("depth", "depth_decoder.model", shape.depth_layers),
    ):

        def stacked(*keys: str, prefix=prefix, num_layers=num_layers) -> torch.Tensor:
            layers = [f"{prefix}.layers.{i}" for i in range(num_layers)]
            return torch.stack(
                [torch.cat([tensors[f"{layer}.{key}.weight"] for key in keys]) for layer in layers]
            )

        out |= {
            f"{name}.attn_norm": stacked("input_layernorm"),
            f"{name}.qkv": stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            f"{name}.o": stacked("self_attn.o_proj"),
            f"{name}.mlp_norm": stacked("post_attention_layernorm"),
            f"{name}.gate_up": stacked("mlp.gate_proj", "mlp.up_proj"),
            f"{name}.down": stacked("mlp.down_proj"),
            f"{name}.norm": tensors[f"{prefix}.norm.weight"],
        }
    return out


def assert_weights(weights: CsmWeights, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        got = weights
        for attribute in name.split("."):
            got = getattr(got, attribute)
        if name == "depth_audio_rows":
            tensor = ops.linear(tensor.to(got.dtype), weights.projection)
        torch.testing.assert_close(
            got, tensor.to(got.dtype), rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rope_spelling", ["parameters", "scaling"])
@pytest.mark.parametrize("layout", ["hf", "sharded", "original", "pickle"])
def test_every_layout_gives_the_models_tensors(tmp_path, shape, layout, rope_spelling):
    tiny = build_tiny(shape)
    tiny.write(tmp_path, layout, rope_spelling)
    loaded = load_checkpoint(tmp_path, torch.float32, allow_pickle=layout == "pickle")
    assert_weights(loaded.weights, transformers_weights(tiny))
    assert loaded.config.num_codebooks == shape.num_codebooks
    assert loaded.config.audio_vocab_size == shape.audio_vocab_size
    assert loaded.config.text_vocab_size == tiny.tokenizer.get_vocab_size()
    assert loaded.config == CsmConfig.from_json(tiny.config)
    assert loaded.config.backbone.norm_eps == shape.norm_eps
    assert loaded.config.depth.norm_eps == shape.depth_norm_eps
    assert loaded.config.backbone.max_positions == shape.max_positions


def test_save_pretrained_folder(tmp_path):
    tiny = build_tiny()
    tiny.model.save_pretrained(tmp_path / "whole")
    tiny.model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    for folder in ("whole", "sharded"):
        loaded = load_checkpoint(tmp_path / folder, torch.float32)
        assert_weights(loaded.weights, transformers_weights(tiny))
        assert set(loaded.codec_tensors) == codec_names(tiny)


def codec_names(tiny) -> set[str]:
    prefix = "codec_model."
    return {name.removeprefix(prefix) for name in tiny.tensors if name.startswith(prefix)}


@pytest.mark.parametrize("audio_tables", ["both", "backbone", "depth"])
def test_one_audio_table_serves_both(tmp_path, audio_tables):
    tiny = build_tiny()
    loaded = load_checkpoint(tiny.write(tmp_path, audio_tables=audio_tables), torch.float32)
    assert_weights(loaded.weights, transformers_weights(tiny))


def test_each_transformer_takes_its_own_audio_table(tmp_path):
    tiny = build_tiny(tied=False)
    weights = load_checkpoint(tiny.write(tmp_path), torch.float32).weights
    expected = transformers_weights(tiny)
    assert not torch.equal(expected["audio_table"], expected["depth_audio_rows"])
    assert_weights(weights, expected)


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("in_file", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_memory", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(tmp_path, layout, in_file, in_memory):
    tiny = build_tiny()
    loaded = load_checkpoint(tiny.write(tmp_path, layout, dtype=in_file), in_memory)
    expected = {name: t.to(in_file) for name, t in transformers_weights(tiny).items()}
    assert_weights(loaded.weights, expected)
    assert loaded.weights.backbone.qkv.dtype == in_memory


# Matrices of multiples of 16 rows and 32 columns, which packing requires.
PACKABLE = TinyShape(heads=4, depth_dim=64, depth_kv_heads=2, depth_ffn=96)


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", PACKINGS)
def test_packed_matrices_are_packed_from_the_files_own_values(tmp_path, quantize, dtype, layout):
    tiny = build_tiny(PACKABLE)
    loaded = load_checkpoint(tiny.write(tmp_path, layout), dtype, quantize=quantize)
    packing = PACKINGS[quantize]
    expected = {}
    for name, tensor in transformers_weights(tiny).items():
        group, _, matrix = name.partition(".")
        packed = group in packing and matrix in (*MATRICES, "")
        expected[name] = pack(tensor, packing[group]) if packed else tensor
    assert_weights(loaded.weights, expected)
    dtypes = {"none": dtype, "int8": torch.int8, "int4": torch.uint8}
    assert loaded.weights.depth.down.dtype == dtypes[quantize]
    assert loaded.weights.code0_head.dtype == loaded.weights.audio_table.dtype == dtype


def test_what_cannot_be_packed_is_named(tmp_path):
    odd = build_tiny(TinyShape(depth_dim=48)).write(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"int4 does not fit this model: code_heads is 67 x 48"):
        load_checkpoint(odd, torch.float32, quantize="int4")


@pytest.mark.parametrize("quantize", PACKINGS)
def test_random_weights_keep_activations_in_size(quantize):
    config = CsmConfig.from_json(build_tiny(PACKABLE).config)
    weights = CsmWeights.random(config, torch.float32, quantize=quantize)
    for matrix in (weights.depth.down, weights.backbone.qkv, weights.code_heads):
        plain = matrix if quantize == "none" else unpack(matrix)
        assert plain.std() * plain.shape[-1] ** 0.5 == pytest.approx(1, rel=0.1)
    x = torch.randn(3, config.depth.ffn_dim)
    out = ops.linear(x, weights.depth.down[0])
    assert out.shape == (3, config.depth.dim)


def test_which_file_is_chosen():
    shards = ["transformers-00001-of-00002.safetensors", "transformers-00002-of-00002.safetensors"]
    index, other = "transformers.safetensors.index.json", "model.safetensors.index.json"
    everything = [*shards, index, other, "model.safetensors", "ckpt.pt", "mimi.safetensors"]
    assert weights_entry({"transformers_weights": "x.safetensors"}, ["x.safetensors"]) is not None
    assert weights_entry({"transformers_weights": other}, everything) == other
    assert weights_entry({"transformers_weights": "gone.json"}, everything) == index
    assert weights_entry({}, everything) == index
    assert weights_entry({}, [other, "model.safetensors"]) == other
    assert weights_entry({}, ["model.safetensors", "x.safetensors"]) == "model.safetensors"
    lone = ["x.safetensors", "mimi.safetensors", "tokenizer-e351c8d8-checkpoint125.safetensors"]
    assert weights_entry({}, lone) == "x.safetensors"
    assert weights_entry({}, shards) is None
    assert weights_entry({}, lone[1:]) is None


def edit(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_each_missing_tensor_is_named(tmp_path, layout):
    tiny = build_tiny(TinyShape(layers=1, depth_layers=1))
    path = tiny.write(tmp_path, layout, audio_tables="depth", codec=None) / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        save_file({n: t for n, t in tensors.items() if n != name}, path)
        with pytest.raises(CheckpointError, match=f"tensor .*{name.replace('.', '[.]')}.* missing"):
            load_checkpoint(tmp_path, torch.float32)


def test_wrong_tensors_are_named(tmp_path):
    path = build_tiny().write(tmp_path) / "model.safetensors"
    q = "backbone_model.layers.1.self_attn.q_proj.weight"

    def fails(change, match):
        original = path.read_bytes()
        edit(path, change)
        with pytest.raises(CheckpointError, match=match) as error:
            load_checkpoint(tmp_path, torch.float32)
        assert "\n" not in str(error.value)
        path.write_bytes(original)

    fails(lambda t: t.update({q: t[q][:-1].clone()}), rf"{q} must be \[96, 64\].*\[95, 64\]")
    fails(lambda t: t.update({q: t[q].to(torch.int8)}), f"{q}.*int8")
    fails(lambda t: t.update({q.replace(".1.", ".2."): t[q].clone()}), "layers.2.*config.json")
    fails(lambda t: t.update({q.replace("weight", "bias"): t[q][:, 0].clone()}), "q_proj.bias")
    fails(lambda t: (t.clear(), t.update({"a": torch.ones(1)})), "holds no CSM")


def test_broken_folders_give_one_line(tmp_path):
    tiny = build_tiny()

    def fails(folder, match, **kwargs):
        with pytest.raises(CheckpointError, match=match) as error:
            load_checkpoint(folder, torch.float32, **kwargs)
        assert "\n" not in str(error.value)

    fails(tmp_path / "nowhere", "is not a folder")
    fails(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{")
    fails(tmp_path, "config.json cannot be read as JSON")
    (tmp_path / "config.json").write_text(json.dumps(tiny.config))
    fails(tmp_path, "has no weights")
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    fails(tmp_path, "cannot be read as safetensors")
    sharded = tiny.write(tmp_path / "sharded", "sharded")
    (sharded / "transformers-00002-of-00002.safetensors").unlink()
    fails(sharded, "transformers-00002-of-00002.safetensors, which does not exist")
    index = sharded / "transformers.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    fails(sharded, "outside its folder")


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_only_when_allowed_and_never_its_code(tmp_path):
    tiny = build_tiny()
    folder = tiny.write(tmp_path, "pickle")
    with pytest.raises(CheckpointError, match=r"only ckpt.pt, a pickle"):
        load_checkpoint(folder, torch.float32)
    torch.save({"a": Payload(str(tmp_path / "ran"))}, folder / "ckpt.pt")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        load_checkpoint(folder, torch.float32, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_codec_inside_beside_or_elsewhere(tmp_path):
    """Each location gives the same codec. A given one comes first, then the first that is found."""
    tiny = build_tiny()
    codes = torch.randint(0, 64, (1, 6, 4))
    expected = tiny.model.codec_model.decode(codes.transpose(1, 2)).audio_values[:, 0]

    def check(folder, codec=None):
        got = load_codec(load_checkpoint(folder, torch.float32), codec).decode(codes)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    inside = tiny.write(tmp_path / "inside")
    save_file({"broken": torch.ones(1)}, inside / "mimi.safetensors")
    check(inside)
    beside = tiny.write(tmp_path / "beside", "original", codec="mimi")
    check(beside)
    for folder in (inside, beside):
        with pytest.raises(ModelNotFoundError, match="no codec '/nowhere'"):
            load_codec(load_checkpoint(folder, torch.float32), "/nowhere")
    bare = tiny.write(tmp_path / "bare", "original", codec=None)
    check(bare, codec=str(beside))
    check(bare, codec=str(beside / "mimi.safetensors"))
    few = build_tiny(TinyShape(num_codebooks=8)).write(tmp_path / "few", codec=None)
    with pytest.raises(ValueError, match="4 codebooks, the model 8"):
        load_codec(load_checkpoint(few, torch.float32), str(beside))


def test_random_weights_keep_activations_in_scale():
    config = CsmConfig.from_json(build_tiny().config)
    weights = CsmWeights.random(config, torch.bfloat16, seed=1)
    again = CsmWeights.random(config, torch.bfloat16, seed=1)
    other = CsmWeights.random(config, torch.bfloat16, seed=2)
    assert torch.equal(weights.depth.gate_up, again.depth.gate_up)
    assert not torch.equal(weights.depth.gate_up, other.depth.gate_up)
    for matrix in (weights.backbone.qkv, weights.depth.down, weights.code_heads):
        assert float(matrix.float().std()) * matrix.shape[-1] ** 0.5 == pytest.approx(1, rel=0.05)
    assert torch.linalg.matrix_rank(weights.backbone.qkv[0].float()) == config.backbone.dim


def test_original_names_round_trip_is_not_the_identity():
    """In the original format the rows of q and k are in another order."""
    tiny = build_tiny()
    original = original_tensors(tiny.tensors, tiny.shape)
    name = "backbone_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(original["backbone.layers.0.attn.q_proj.weight"], tiny.tensors[name])
