"""Tiny random CSM checkpoints, made with transformers and written in every known layout.

`build_tiny` makes the model, `TinyCsm.write` writes a checkpoint folder of it. The weights are
scaled so that logits lie far apart: greedy codes in float32 then do not depend on the order of
additions.
"""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_parts import SPECIAL_TOKENS, force_stop, tiny_tokenizer

# Chosen so that llama3 scales or smooths every frequency that a tiny model's positions reach.
BACKBONE_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEPTH_ROPE = {
    **BACKBONE_ROPE,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 8,
}

CSM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny CSM. As in transformers, heads * head_dim may differ from dim."""

    num_codebooks: int = 4
    audio_vocab_size: int = 67  # the codec's 64 codes and 3 that CSM adds
    layers: int = 2
    dim: int = 64
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    norm_eps: float = 1e-5
    max_positions: int = 256
    depth_layers: int = 2
    depth_dim: int = 48
    depth_heads: int = 4
    depth_kv_heads: int = 1
    depth_head_dim: int = 16
    depth_ffn: int = 80
    depth_norm_eps: float = 1e-6


@dataclass(frozen=True)
class TinyCsm:
    """A tiny model and the contents of its checkpoint.

    Attributes:
        model: transformers' `CsmForConditionalGeneration`, float32, eval.
        tensors: the model's tensors by their names in a HF file, both audio tables included.
        config: config.json as transformers writes it.
        tokenizer: `tokenizers.Tokenizer`.
    """

    shape: TinyShape
    model: torch.nn.Module
    tensors: dict[str, Tensor]
    config: dict
    tokenizer: object

    def write(
        self,
        folder: Path,
        layout: str = "hf",
        rope_spelling: str = "parameters",
        audio_tables: str = "both",
        codec: str | None = "inside",
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        """Write a checkpoint folder.

        Args:
            folder: created if missing.
            layout: "hf" (model.safetensors, HF names), "sharded" (the shards and index that
                config.json's `transformers_weights` names, next to a decoy model.safetensors with
                original names and other values), "original" (model.safetensors, original names)
                or "pickle" (ckpt.pt, original names).
            rope_spelling: "parameters" (`rope_parameters`) or "scaling" (`rope_scaling` and
                `rope_theta`).
            audio_tables: "both", "backbone" or "depth", for the HF layouts.
            codec: "inside" (`codec_model.*`, the HF layouts only), "mimi" (mimi.safetensors, HF
                names) or None.
            dtype: dtype of the CSM tensors in the files; the codec stays float32.

        Returns:
            `folder`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads(json.dumps(self.config))
        config["dtype"] = str(dtype).removeprefix("torch.")
        if rope_spelling == "scaling":
            for part in (config, config["depth_decoder_config"]):
                rope = part.pop("rope_parameters")
                part["rope_theta"] = rope.pop("rope_theta")
                part["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        csm = {
            name: tensor.to(dtype)
            for name, tensor in self.tensors.items()
            if not name.startswith("codec_model.")
        }
        inside = {n: t for n, t in self.tensors.items() if n.startswith("codec_model.")}
        if layout in ("hf", "sharded"):
            hf = dict(csm)
            if audio_tables == "backbone":
                del hf["depth_decoder.model.embed_tokens.weight"]
            elif audio_tables == "depth":
                del hf["backbone_model.embed_tokens.embed_audio_tokens.weight"]
            if codec == "inside":
                hf |= inside
            if layout == "hf":
                _save(hf, folder / "model.safetensors")
            else:
                config["transformers_weights"] = "transformers.safetensors.index.json"
                _save_sharded(hf, folder)
                _save(
                    original_tensors({n: -t for n, t in csm.items()}, self.shape),
                    folder / "model.safetensors",
                )
        elif layout == "original":
            _save(original_tensors(csm, self.shape), folder / "model.safetensors")
        elif layout == "pickle":
            torch.save(original_tensors(csm, self.shape), folder / "ckpt.pt")
        else:
            raise ValueError(f"no layout {layout!r}")
        if codec == "mimi":
            _save(
                {n.removeprefix("codec_model."): t for n, t in inside.items()},
                folder / "mimi.safetensors",
            )
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        self.tokenizer.save(str(folder / "tokenizer.json"))
        return folder


@functools.lru_cache(maxsize=16)
def build_tiny(
    shape: TinyShape = TinyShape(),
    seed: int = 0,
    rope: str = "llama3",
    tied: bool = True,
    stop_frame: int | None = None,
    near_stop: bool = False,
) -> TinyCsm:
    """A tiny random CSM with a tiny Mimi (24 kHz, 1,920 samples per frame) inside.

    Cached: do not modify the result.

    Args:
        shape: sizes.
        seed: seed of the weights.
        rope: "llama3" (the real checkpoint's kind of scaling), "csm" (its numbers too) or "default"
            (none).
        tied: both transformers share one audio table; otherwise there are two that differ.
        stop_frame: for any prompt, greedy and sampled generation gives an all-zero frame at this
            index and not before. None: practically never.
        near_stop: at `stop_frame` every code but the last is 0, which is not a stop frame.
    """
    pytest.importorskip("transformers", reason="no transformers to make a checkpoint with")
    from transformers import CsmConfig, CsmForConditionalGeneration

    tokenizer = tiny_tokenizer()
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    s = shape
    config = CsmConfig(
        num_codebooks=s.num_codebooks,
        vocab_size=s.audio_vocab_size,
        text_vocab_size=tokenizer.get_vocab_size(),
        hidden_size=s.dim,
        intermediate_size=s.ffn,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        rms_norm_eps=s.norm_eps,
        max_position_embeddings=s.max_positions,
        rope_parameters=_rope(BACKBONE_ROPE, rope),
        bos_token_id=ids["<|begin_of_text|>"],
        pad_token_id=ids["<|AUDIO|>"],
        audio_token_id=ids["<|AUDIO|>"],
        audio_eos_token_id=ids["<|audio_eos|>"],
        codebook_pad_token_id=s.audio_vocab_size - 1,
        tie_codebooks_embeddings=tied,
        depth_decoder_config={
            "num_codebooks": s.num_codebooks,
            "vocab_size": s.audio_vocab_size,
            "backbone_hidden_size": s.dim,
            "hidden_size": s.depth_dim,
            "intermediate_size": s.depth_ffn,
            "num_hidden_layers": s.depth_layers,
            "num_attention_heads": s.depth_heads,
            "num_key_value_heads": s.depth_kv_heads,
            "head_dim": s.depth_head_dim,
            "rms_norm_eps": s.depth_norm_eps,
            "max_position_embeddings": max(9, s.num_codebooks + 1),
            "rope_parameters": _rope(DEPTH_ROPE, rope),
        },
        codec_config={
            "model_type": "mimi",
            "num_filters": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "codebook_size": s.audio_vocab_size - 3,
            "codebook_dim": 16,
            "vector_quantization_hidden_dimension": 16,
            "num_quantizers": s.num_codebooks,
            "upsample_groups": 32,
        },
    )
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        model = CsmForConditionalGeneration(config).eval().requires_grad_(False)
        # The codec's tensor names in a file differ from the module's: transformers writes them.
        model.save_pretrained(folder)
        written = json.loads((Path(folder) / "config.json").read_text())
        tensors = _separated(load_file(Path(folder) / "model.safetensors"), tied)
        if stop_frame is not None:
            force_stop(tensors, s.num_codebooks, stop_frame, near_stop)
        _save(tensors, Path(folder) / "model.safetensors")
        model = CsmForConditionalGeneration.from_pretrained(folder).eval().requires_grad_(False)
    return TinyCsm(shape, model, tensors, written, tokenizer)


def original_tensors(hf: dict[str, Tensor], shape: TinyShape) -> dict[str, Tensor]:
    """CSM tensors in HF names -> the original (torchtune) names, with interleaved rotary rows."""
    plain = {
        "embed_text_tokens.weight": "text_embeddings.weight",
        "backbone_model.embed_tokens.embed_audio_tokens.weight": "audio_embeddings.weight",
        "lm_head.weight": "codebook0_head.weight",
        "depth_decoder.codebooks_head.weight": "audio_head",
        "depth_decoder.model.inputs_embeds_projector.weight": "projection.weight",
        "backbone_model.norm.weight": "backbone.norm.scale",
        "depth_decoder.model.norm.weight": "decoder.norm.scale",
    }
    out = {new: hf[old] for old, new in plain.items()}
    parts = (
        ("backbone_model", "backbone", shape.layers, shape.head_dim),
        ("depth_decoder.model", "decoder", shape.depth_layers, shape.depth_head_dim),
    )
    for old, new, layers, head_dim in parts:
        for i in range(layers):
            here = {
                n.removeprefix(f"{old}.layers.{i}."): t
                for n, t in hf.items()
                if n.startswith(f"{old}.layers.{i}.")
            }
            there = {
                "attn.q_proj.weight": _interleave(here["self_attn.q_proj.weight"], head_dim),
                "attn.k_proj.weight": _interleave(here["self_attn.k_proj.weight"], head_dim),
                "attn.v_proj.weight": here["self_attn.v_proj.weight"],
                "attn.output_proj.weight": here["self_attn.o_proj.weight"],
                "mlp.w1.weight": here["mlp.gate_proj.weight"],
                "mlp.w2.weight": here["mlp.down_proj.weight"],
                "mlp.w3.weight": here["mlp.up_proj.weight"],
                "sa_norm.scale": here["input_layernorm.weight"],
                "mlp_norm.scale": here["post_attention_layernorm.weight"],
            }
            out |= {f"{new}.layers.{i}.{n}": t for n, t in there.items()}
    return out


def _interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Half-split rotary rows -> interleaved rows: the inverse of CSM's conversion to HF."""
    rows, width = weight.shape
    halves = weight.view(rows // head_dim, 2, head_dim // 2, width)
    return halves.transpose(1, 2).reshape(rows, width)


def _rope(scaled: dict, rope: str) -> dict:
    if rope == "csm":
        return dict(CSM_ROPE)
    return dict(scaled) if rope == "llama3" else {"rope_type": "default", "rope_theta": 10000.0}


def _separated(tensors: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Redraw every tensor at a scale that lets each layer matter and keeps logits far apart."""
    depth_table = "depth_decoder.model.embed_tokens.weight"
    backbone_table = "backbone_model.embed_tokens.embed_audio_tokens.weight"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shapes[backbone_table] = shapes[depth_table]
    out = {}
    for name in sorted(shapes):
        size = shapes[name]
        noise = torch.randn(size)
        if name.endswith("codebook.initialized"):
            out[name] = torch.ones(size)
        elif name.endswith("codebook.cluster_usage"):
            out[name] = torch.rand(size) + 0.5
        elif name.endswith("norm.weight"):
            out[name] = 1 + 0.1 * noise
        elif name.endswith("layer_scale.scale"):
            out[name] = 0.3 + 0.1 * noise
        elif name.endswith(".bias"):
            out[name] = 0.1 * noise
        elif "embed" in name and "projector" not in name:
            out[name] = noise
        elif name in ("depth_decoder.codebooks_head.weight", "lm_head.weight"):
            out[name] = noise * (4 / size[1] ** 0.5)
        else:
            out[name] = noise / torch.Size(size[1:]).numel() ** 0.5
    for name in shapes:
        if name.endswith("codebook.embed_sum"):  # gives the code vectors unit scale
            out[name] *= out[name.replace("embed_sum", "cluster_usage")][:, None]
    if tied:
        out[depth_table] = out[backbone_table].clone()
    return out


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for i, half in enumerate(halves, 1):
        file = f"transformers-{i:05d}-of-00002.safetensors"
        _save({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "transformers.safetensors.index.json").write_text(json.dumps(index))
