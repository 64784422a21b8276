"""config.json in both formats; rotary tables compared with transformers'."""

import json

import pytest
import torch

from checkpoints import TinyShape, build_tiny
from vox_serve.model_config import CsmConfig, RopeScaling, TransformerConfig

REAL_CONFIG = {
    "backbone_flavor": "llama-1B",
    "decoder_flavor": "llama-100M",
    "text_vocab_size": 128256,
    "audio_vocab_size": 2051,
    "audio_num_codebooks": 32,
}


def rope_reference(part, config: TransformerConfig) -> torch.Tensor:
    """The table of transformers' rotary embedding."""
    positions = torch.arange(config.max_positions)[None]
    cos, sin = part.rotary_emb(torch.zeros(1), positions)
    half = config.head_dim // 2
    return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1)


@pytest.mark.parametrize("rope", ["llama3", "default"])
@pytest.mark.parametrize("rope_spelling", ["parameters", "scaling"])
def test_rope_table_is_transformers(tmp_path, rope, rope_spelling):
    tiny = build_tiny(TinyShape(num_codebooks=8, depth_head_dim=8), rope=rope)
    tiny.write(tmp_path, rope_spelling=rope_spelling)
    config = CsmConfig.from_json(json.loads((tmp_path / "config.json").read_text()))
    for ours, part in (
        (config.backbone, tiny.model.backbone_model),
        (config.depth, tiny.model.depth_decoder.model),
    ):
        assert (ours.rope_scaling is not None) == (rope == "llama3")
        expected = rope_reference(part, ours)
        torch.testing.assert_close(ours.rope_table(), expected, rtol=0, atol=0)


def test_published_shapes_of_config():
    config = CsmConfig.from_json(REAL_CONFIG)
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    assert config.backbone == TransformerConfig(
        16, 2048, 32, 8, 64, 8192, 1e-5, 2048, 500000.0, scaling
    )
    assert config.depth == TransformerConfig(4, 1024, 8, 2, 128, 8192, 1e-5, 33, 500000.0, scaling)
    assert (config.num_codebooks, config.audio_vocab_size) == (32, 2051)
    assert config.text_vocab_size == 128256


def test_published_rope_is_the_same_in_both_formats():
    """torchtune's 1 / 4 / 8192 equals the values in transformers' config of sesame/csm-1b."""
    from transformers import CsmConfig as HfConfig
    from transformers.models.csm.modeling_csm import CsmRotaryEmbedding

    base = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0}
    backbone = base | {
        "low_freq_factor": 0.125,
        "high_freq_factor": 0.5,
        "original_max_position_embeddings": 1024,
    }
    depth = base | {
        "low_freq_factor": 0.001953125,
        "high_freq_factor": 0.0078125,
        "original_max_position_embeddings": 16,
    }
    hf = HfConfig(rope_parameters=backbone, depth_decoder_config={"rope_parameters": depth})
    original = CsmConfig.from_json(REAL_CONFIG)
    ours = CsmConfig.from_json(hf.to_dict())
    for config, same, theirs in (
        (ours.backbone, original.backbone, hf),
        (ours.depth, original.depth, hf.depth_decoder_config),
    ):
        part = torch.nn.Module()
        part.rotary_emb = CsmRotaryEmbedding(theirs)
        expected = rope_reference(part, config)
        torch.testing.assert_close(config.rope_table(), expected, rtol=0, atol=0)
        assert torch.equal(config.rope_table(), same.rope_table())


def test_config_without_rope_scaling_has_none():
    """transformers' class default is no scaling, although the published model has it."""
    settings = build_tiny(rope="default").config
    assert CsmConfig.from_json(settings).backbone.rope_theta == 10000.0
    stripped = json.loads(json.dumps(settings))
    del stripped["rope_parameters"], stripped["depth_decoder_config"]["rope_parameters"]
    config = CsmConfig.from_json(stripped)
    assert config.backbone.rope_scaling is None
    assert config.depth.rope_scaling is None
    assert config.backbone.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_kv_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_codebooks": 1}, "num_codebooks"),
        ({"num_codebooks": 5}, "depth_decoder_config.num_codebooks"),
        ({"vocab_size": 70}, "depth_decoder_config.vocab_size"),
        ({"hidden_size": 72}, "depth_decoder_config.backbone_hidden_size"),
        ({"depth_decoder_config": []}, None),
        ({"depth_decoder_config": "x"}, "depth_decoder_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"backbone_flavor": "llama-9B"}, "backbone_flavor"),
    ],
)
def test_unsupported_config_is_named(change, named):
    settings = build_tiny().config | change
    if named is None:
        settings |= {"num_codebooks": 4, "depth_decoder_config": None}
        assert CsmConfig.from_json(settings).depth.dim == 1024
        return
    with pytest.raises(ValueError, match=named):
        CsmConfig.from_json(settings)
    depth = settings["depth_decoder_config"]
    if set(change) & {"hidden_act", "attention_bias", "mlp_bias"}:
        settings = build_tiny().config | {"depth_decoder_config": depth | change}
        with pytest.raises(ValueError, match=f"depth_decoder_config.{named}"):
            CsmConfig.from_json(settings)
