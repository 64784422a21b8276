"""A whole frame of full-size CSM-1B: backbone step, codebook 0, depth decode, KV rows written.

Random weights of the real sizes, greedy, 128 cached positions, from a frame's codes to the next
frame's. The peer is transformers' `CsmForConditionalGeneration.generate` on the very same weights:
milliseconds from one backbone step to the next, the prompt's left out.
"""

import math
import statistics
import time
from itertools import pairwise

import roofline
import torch
from report import Report
from torch import Tensor

from vox_serve.csm_weights import CsmWeights, TransformerWeights
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig
from vox_serve.sampling import SamplingParams, SamplingRows

CACHED = 128
FRAME_MS = 80.0
CSM_1B = {
    "backbone_flavor": "llama-1B",
    "decoder_flavor": "llama-100M",
    "text_vocab_size": 128256,
    "audio_vocab_size": 2051,
    "audio_num_codebooks": 32,
}


def frame_bytes(weights: CsmWeights) -> int:
    """Weight bytes read for one frame at batch 1: the backbone once, the depth decoder K - 1 times.

    Its first two positions have their inputs at once, and go through together.
    """
    once = transformer_bytes(weights.backbone)
    once += num_tensor_bytes([weights.code0_head, weights.code_heads])
    return len(weights.code_heads) * depth_step_bytes(weights) + once


def depth_step_bytes(weights: CsmWeights) -> int:
    """Weight bytes read in one step of the depth decoder, its head left out."""
    return num_tensor_bytes([weights.projection]) + transformer_bytes(weights.depth)


def transformer_bytes(t: TransformerWeights) -> int:
    """Weight bytes read in one pass through a transformer's layers."""
    return num_tensor_bytes([t.attn_norm, t.qkv, t.o, t.mlp_norm, t.gate_up, t.down, t.norm])


def num_tensor_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class OurFrames:
    """Frame after frame for `batch` sequences, each from `CACHED` positions on."""

    def __init__(self, model: CsmModel, batch: int):
        self.model, self.batch = model, batch
        self.cache = KvCache(model.config.backbone, batch, model.dtype, model.device)
        self.cache.k_pages.normal_()
        self.cache.v_pages.normal_()
        self.sequences = [CacheSequence() for _ in range(batch)]
        self.codes = torch.randint(0, 2048, (batch, model.config.num_codebooks))
        greedy = [SamplingParams(temperature=0)] * batch
        self.rows = SamplingRows.of(greedy, [0] * batch, [0] * batch, [[]] * batch, model.device)

    def frame_ms(self) -> float:
        for sequence in self.sequences:
            self.cache.release(sequence)
            self.cache.extend(sequence, CACHED)
        start = time.perf_counter()
        frames, mask = self.model.next_inputs(self.codes)
        batch = CacheBatch.decode(self.cache, self.sequences)
        hidden = self.model.backbone_step(frames, mask, batch, self.cache)
        self.codes = self.model.draw_frames(hidden, self.rows)
        return (time.perf_counter() - start) * 1e3


class TransformersFrames:
    """The same with transformers, its parameters views of our tensors."""

    def __init__(self, model: CsmModel, batch: int):
        self.model = hf_model(model)
        ids = torch.randint(0, 1000, (batch, CACHED))
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.starts: list[float] = []
        self.model.backbone_model.register_forward_pre_hook(
            lambda *_: self.starts.append(time.perf_counter())
        )

    def frame_ms(self, frames: int = 4) -> list[float]:
        """From one backbone step to the next, for each frame whose prompt is already cached."""
        self.starts.clear()
        greedy = {"do_sample": False, "depth_decoder_do_sample": False}
        self.model.generate(
            **self.inputs, **greedy, min_new_tokens=frames + 2, max_new_tokens=frames + 2
        )
        assert len(self.starts) == frames + 2, "an utterance ended early"
        return [(b - a) * 1e3 for a, b in pairwise(self.starts[1:])]


def hf_model(model: CsmModel):
    """transformers' model around our weights: no copy, no initialisation."""
    import transformers

    config, w = model.config, model.weights

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
        max_position_embeddings=config.backbone.max_positions,
        depth_decoder_config={**sizes(config.depth), "max_position_embeddings": 33},
        codec_config={"model_type": "mimi", "num_filters": 1, "num_hidden_layers": 0},
    )
    with torch.device("meta"):
        hf = transformers.CsmForConditionalGeneration(hf_config).eval()
    tensors = {
        "embed_text_tokens.weight": w.text_table,
        "backbone_model.embed_tokens.embed_audio_tokens.weight": w.audio_table,
        "depth_decoder.model.embed_tokens.weight": w.depth_audio_table,
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
    missing = hf.load_state_dict(tensors, strict=False, assign=True).missing_keys
    assert all(name.startswith("codec_model.") for name in missing), missing
    hf.codec_model = None
    for part in (hf.backbone_model, hf.depth_decoder.model):
        part.rotary_emb = type(part.rotary_emb)(config=part.config)  # its buffers were meta
    offsets = torch.arange(config.num_codebooks) * config.audio_vocab_size
    hf.backbone_model.embed_tokens.audio_tokens_offsets = offsets
    return hf


def run(report: Report, dtypes: list[torch.dtype], batches: list[int], peer: bool) -> None:
    table = report.table(
        "frame",
        [
            *("dtype", "batch", "ms", "GB read", "% roofline", "real-time factor"),
            *("frames/s", "transformers ms", "x transformers"),
        ],
    )
    config = CsmConfig.from_json(CSM_1B)
    for dtype in dtypes:
        model = CsmModel(config, CsmWeights.random(config, dtype))
        num_bytes = frame_bytes(model.weights)
        for batch in batches:
            ours = OurFrames(model, batch)
            theirs = TransformersFrames(model, batch) if peer else None
            times: dict[str, list[float]] = {"ours": [], "theirs": [], "bandwidth": []}
            for warm in (False, True, True, True):
                ms = [ours.frame_ms() for _ in range(4)]
                their_ms = theirs.frame_ms() if theirs else [math.nan]
                if warm:
                    times["ours"] += ms
                    times["theirs"] += their_ms
                    times["bandwidth"] += [roofline.read_bandwidth() for _ in range(3)]
            ms = statistics.median(times["ours"])
            floor_ms = num_bytes / statistics.median(times["bandwidth"]) * 1e3
            their_ms = statistics.median(times["theirs"])
            table.add(
                *(str(dtype).removeprefix("torch."), batch, ms, num_bytes / 1e9),
                *(100 * floor_ms / ms, ms / FRAME_MS, 1e3 * batch / ms, their_ms, their_ms / ms),
            )
        del model, ours, theirs
