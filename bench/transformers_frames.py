"""Frames of transformers' `CsmForConditionalGeneration` on our weights."""

import time
from itertools import pairwise

import torch
import transformers
from csm_1b_shapes import CACHED

from vox_serve.csm_weights import CsmWeights
from vox_serve.model_config import CsmConfig


class TransformersFrames:
    """Generates frames of `batch` utterances after `CACHED` positions, greedy."""

    def __init__(self, config: CsmConfig, weights: CsmWeights, batch: int, compiled: bool = False):
        self.model = hf_model(config, weights)
        ids = torch.randint(0, 1000, (batch, CACHED))
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.starts: list[float] = []
        if compiled:
            # The KV cache grows with every position, so sizes are compiled as symbols.
            for kind in (transformers.CsmBackboneModel, transformers.CsmDepthDecoderModel):
                part = _module(self.model, kind)
                part.forward = torch.compile(part.forward, dynamic=True)
        _module(self.model, transformers.CsmBackboneModel).register_forward_pre_hook(
            lambda *_: self.starts.append(time.perf_counter())
        )

    def frames_ms(self, frames: int) -> list[float]:
        """Milliseconds from one backbone step to the next; the step with the prompt is skipped."""
        self.starts.clear()
        greedy = {"do_sample": False, "depth_decoder_do_sample": False}
        self.model.generate(
            **self.inputs, **greedy, min_new_tokens=frames + 2, max_new_tokens=frames + 2
        )
        assert len(self.starts) == frames + 2, "an utterance ended early"
        return [(b - a) * 1e3 for a, b in pairwise(self.starts[1:])]


def _module(model: torch.nn.Module, kind: type) -> torch.nn.Module:
    """The submodule of a class: attribute names change between transformers' versions."""
    return next(module for module in model.modules() if isinstance(module, kind))


def hf_model(config: CsmConfig, weights: CsmWeights):
    """transformers' model around our weights, without copying or initialising them."""
    w = weights

    def sizes(part) -> dict:
        scaling = part.rope_scaling
        return {
            "hidden_size": part.dim,
            "intermediate_size": part.ffn_dim,
            "num_hidden_layers": part.num_layers,
            "num_attention_heads": part.num_heads,
            "num_key_value_heads": part.num_kv_heads,
            "head_dim": part.head_dim,
            "rms_norm_eps": part.norm_eps,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": part.rope_theta,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            },
        }

    hf_config = transformers.CsmConfig(
        **sizes(config.backbone),
        text_vocab_size=config.text_vocab_size,
        max_position_embeddings=config.backbone.max_positions,
        depth_decoder_config={
            **sizes(config.depth),
            "backbone_hidden_size": config.backbone.dim,
            "max_position_embeddings": 33,
        },
        codec_config={"model_type": "mimi", "num_filters": 2, "num_hidden_layers": 0},
    )
    # Names as in checkpoint files: the names of transformers' modules change between versions.
    tensors = {
        "embed_text_tokens.weight": w.text_table,
        "backbone_model.embed_tokens.embed_audio_tokens.weight": w.audio_table,
        "depth_decoder.model.embed_tokens.weight": w.audio_table,
        "lm_head.weight": w.code0_head,
        "depth_decoder.codebooks_head.weight": w.code_heads.transpose(1, 2),
        "depth_decoder.model.inputs_embeds_projector.weight": w.projection,
    }
    parts = (
        ("backbone_model", config.backbone, w.backbone),
        ("depth_decoder.model", config.depth, w.depth),
    )
    for prefix, c, t in parts:
        tensors[f"{prefix}.norm.weight"] = t.norm
        widths = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        for i in range(c.num_layers):
            q, k, v = t.qkv[i].split(widths)
            gate, up = t.gate_up[i].chunk(2)
            layer = {
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": t.o[i],
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": t.down[i],
                "input_layernorm": t.attn_norm[i],
                "post_attention_layernorm": t.mlp_norm[i],
            }
            tensors |= {f"{prefix}.layers.{i}.{n}.weight": x for n, x in layer.items()}
    hf, loaded = transformers.CsmForConditionalGeneration.from_pretrained(
        None,
        config=hf_config,
        state_dict=tensors,
        dtype=w.text_table.dtype,
        output_loading_info=True,
    )
    missing = loaded["missing_keys"]
    assert all(name.startswith("codec_model.") for name in missing), missing
    return hf.eval()
