"""Broken and hostile adapters are refused in one line that names the file, in bounded memory."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import build_tiny
from limits import refusal
from vox_serve.adapter_config import AdapterConfig
from vox_serve.weights import load_checkpoint

LAYER = "base_model.model.backbone_model.layers.0.self_attn."
A, B = f"{LAYER}q_proj.lora_A.weight", f"{LAYER}q_proj.lora_B.weight"
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "some/base"}


@pytest.fixture
def base(tmp_path):
    return build_tiny().write(tmp_path / "base")


@pytest.fixture
def folder(tmp_path):
    """A valid adapter for q_proj of the first layer."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_settings(folder)
    save_file({A: torch.randn(4, 64), B: torch.randn(96, 4)}, folder / "adapter_model.safetensors")
    return folder


def write_settings(folder, **settings) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))


def write_tensors(folder, **tensors) -> None:
    """Replace tensors by names that are short here: `a`, `b`, or full names; None removes one."""
    names = {"a": A, "b": B}
    path = folder / "adapter_model.safetensors"
    found = load_file(path) | {names.get(name, name): t for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in found.items() if t is not None}, path)


def refused(base, folder, **options) -> str:
    return refusal(load_checkpoint, base, torch.float32, adapter=folder, **options)


def test_the_valid_adapter_loads(base, folder):
    load_checkpoint(base, torch.float32, adapter=folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"peft_type": None}, "peft_type must be 'LORA', got None"),
        ({"peft_type": None, "fine_tune_type": "lora"}, "is of an MLX adapter: fuse it"),
        ({"use_dora": True}, "use_dora = True is not supported: merge the adapter with peft"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        (
            {"target_parameters": ["codebooks_head.weight"]},
            "target_parameters = ['codebooks_head.weight'] is not supported: merge the adapter "
            "with peft, and give the result as --model",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes"),
        ({"init_lora_weights": []}, r"init_lora_weights [] changes"),
        ({"r": 0}, "r must be a whole number from 1 to 16384, got 0"),
        ({"r": -3}, "r must be a whole number"),
        ({"r": 10**9}, "r must be a whole number from 1 to 16384, got 1000000000"),
        ({"r": True}, "r must be a whole number"),
        ({"r": 4.5}, "r must be a whole number"),
        ({"lora_alpha": "much"}, "lora_alpha must be a number, got 'much'"),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] must be a whole number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
        ({"rank_pattern": dict.fromkeys(map(str, range(1001)), 1)}, "of at most 1000 values"),
        ({"alpha_pattern": {"q_proj": []}}, "alpha_pattern['q_proj'] must be a number"),
        ({"alpha_pattern": {"(.*a.*)*$": 1}}, "regular expression that is not supported"),
        ({"alpha_pattern": {"(" * 5000: 1}}, "regular expression that is not supported"),
        ({"alpha_pattern": {"[": 1}}, "regular expression that is not supported"),
        ({"alpha_pattern": {"[z-a]": 1}}, "regular expression that is not supported"),
        ({"alpha_pattern": {"a?" * 30: 1}}, "regular expression that is not supported"),
        ({"alpha_pattern": {f"a{i}.*": 1 for i in range(65)}}, "regular expression"),
        ({"target_modules": [1]}, "target_modules must be names, got [1]"),
        ({"rank_pattern": {"q_proj": 5}}, f"tensor {A} must be [5, 64] by adapter_config.json"),
        ({"target_modules": ["q_proj"]}, "tensors of backbone_model.layers.1.self_attn.q_proj are"),
        ({"target_modules": ["o_proj"]}, "which adapter_config.json has in target_modules"),
    ],
    ids=str,
)
def test_settings(base, folder, settings, said):
    write_settings(folder, **settings)
    message = refused(base, folder)
    assert said in message
    assert str(folder) in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"r": 1, "r": 2}', '{"lora_alpha": NaN}', "[" * 9]
)
def test_settings_that_are_no_json(base, folder, text):
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refused(base, folder)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.randn(4, 63)}, f"tensor {A} must be [4, 64] by adapter_config.json and the"),
        ({"a": torch.randn(0, 64)}, f"tensor {A} must be [4, 64]"),
        ({"a": torch.randn(64)}, f"tensor {A} must be [4, 64]"),
        ({"b": torch.randn(96, 3)}, f"tensor {B} must be [96, 4]"),
        ({"b": torch.zeros(96, 4, dtype=torch.int8)}, "has dtype torch.int8"),
        ({"b": None}, f"{A} has no lora_B beside it"),
        ({"a": None}, f"{B} has no lora_A beside it"),
        ({"a": torch.full((4, 64), float("nan"))}, f"tensor {A} in"),
        ({"b": torch.full((96, 4), float("inf"))}, f"tensor {B} in"),
        ({"a": torch.full((4, 64), 3e38), "b": torch.full((96, 4), 3e38)}, "overflows"),
        ({f"{LAYER}q_proj.lora_B.bias": torch.zeros(96)}, "lora_B.bias is not supported"),
        ({f"{LAYER}q_proj.lora_magnitude_vector": torch.ones(96)}, "lora_magnitude_vector"),
        ({f"{LAYER}q_proj.lora_embedding_A": torch.ones(4, 64)}, "lora_embedding_A is not support"),
        ({f"{LAYER}x_proj.lora_A.weight": torch.ones(4, 64)}, "belongs to no part of a CSM"),
        ({"base_model.model.lm_head.weight": torch.ones(3, 3)}, "lm_head.weight must be [67, 64]"),
        (
            {"base_model.model.lm_head.weight": torch.full((67, 64), float("nan"))},
            "tensor base_model.model.lm_head.weight in",
        ),
        ({f"{LAYER}q_proj.lora_A.default.weight": torch.ones(4, 64)}, "are the same"),
        (
            {
                "base_model.model.codec_model.decoder_transformer.layers.0.self_attn.q_proj.lora_"
                f"{factor}.weight": torch.ones(4, 4)
                for factor in "AB"
            },
            "changes the codec, which is not supported",
        ),
        (
            {"base_model.model.codec_model.x.weight": torch.ones(2)},
            "changes the codec, which is not supported",
        ),
        ({"../../etc/passwd": torch.ones(2)}, "belongs to no part of a CSM"),
        ({"": torch.ones(2)}, "belongs to no part of a CSM"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_tensors(base, folder, tensors, said):
    write_tensors(folder, **tensors)
    message = refused(base, folder)
    assert said in message
    assert str(folder / "adapter_model.safetensors") in message


def test_an_untrained_product_of_the_codec_is_left_out(base, folder):
    name = "base_model.model.codec_model.decoder_transformer.layers.0.self_attn.q_proj.lora_"
    write_tensors(
        folder, **{f"{name}A.weight": torch.ones(4, 4), f"{name}B.weight": torch.zeros(4, 4)}
    )
    load_checkpoint(base, torch.float32, adapter=folder)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated(base, folder, share):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert str(path) in refused(base, folder)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [((2**40, 64), (0, 2**48)), ((2**62, 64), (0, 8)), ((4, 64), (0, 1 << 20))],
)
def test_a_huge_rank(base, folder, shape, offsets):
    header = {A: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    text = json.dumps(header).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert str(path) in refused(base, folder)


def test_missing_files(base, folder, tmp_path):
    assert f"{tmp_path} has no adapter_config.json" in refused(base, tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    assert f"{folder} has no adapter_model.safetensors" in refused(base, folder)
    (folder / "adapters.safetensors").touch()
    assert "is of an MLX adapter" in refused(base, folder)
    torch.save(tensors, folder / "adapter_model.bin")
    assert "allow pickle files explicitly" in refused(base, folder)
    load_checkpoint(base, torch.float32, adapter=folder, allow_pickle=True)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "cannot be read as plain tensors" in refused(base, folder, allow_pickle=True)


def test_an_adapter_as_the_model(folder, tmp_path):
    said = refusal(load_checkpoint, folder, torch.float32)
    assert (
        f"{folder} is a LoRA adapter, no model: give --model some/base --adapter {folder}" in said
    )
    (folder / "config.json").write_text("{}")
    assert "is a LoRA adapter, no model" in refusal(load_checkpoint, folder, torch.float32)
    write_settings(folder, use_dora=True)
    said = refusal(load_checkpoint, folder, torch.float32)
    assert "is an adapter, no model, and cannot be used" in said
    assert "use_dora" in said


def test_a_model_as_the_adapter(base):
    said = refused(base, base)
    assert f"{base} has no adapter_config.json" in said
    assert "it is a model: give it as --model" in said


def test_a_trainers_folder_of_checkpoints(base, folder, tmp_path):
    folder.rename(tmp_path / "checkpoint-500")
    assert "its subfolder checkpoint-500 has one" in refused(base, tmp_path)


def test_quick_expressions(folder):
    """Expressions that peft's users write are matched as peft does."""
    write_settings(
        folder, alpha_pattern={r"backbone_model.*\.(q_proj|k_proj)": 1, r"layers\.[01]\.mlp\..*": 2}
    )
    settings = AdapterConfig.read(folder)
    for module, alpha in (
        ("backbone_model.layers.3.self_attn.q_proj", 1),
        ("depth_decoder.model.layers.0.self_attn.q_proj", 8),
        ("depth_decoder.model.layers.1.mlp.up_proj", 2),
        ("depth_decoder.model.layers.2.mlp.up_proj", 8),
    ):
        assert settings.scaling_of(module) == alpha / 4
