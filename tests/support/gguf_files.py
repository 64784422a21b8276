"""Writes tiny CSM checkpoints as GGUF files, with the names and metadata of csm.rs and CrispASR.

Names, metadata and the choice of what is quantised follow csm.rs' scripts/quantize.py, CrispASR's
models/convert-csm-to-gguf.py and crispasr-quantize (docs/models.md has the revisions).
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints import TinyCsm, original_tensors

CODEC = "codec_model."
TYPES = ("f32", "f16", "q8_0", "q4_k")

_CRISPASR_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CRISPASR_MODEL = {
    "backbone_model.embed_tokens.embed_audio_tokens.weight": "backbone.audio_embd.weight",
    "embed_text_tokens.weight": "backbone.text_embd.weight",
    "lm_head.weight": "backbone.codebook0_head.weight",
    "backbone_model.norm.weight": "backbone.output_norm.weight",
    "depth_decoder.codebooks_head.weight": "depth.codebooks_head.weight",
    "depth_decoder.model.embed_tokens.weight": "depth.token_embd.weight",
    "depth_decoder.model.inputs_embeds_projector.weight": "depth.projection.weight",
    "depth_decoder.model.norm.weight": "depth.output_norm.weight",
}
_CRISPASR_CODEC_LAYER = {
    "input_layernorm.weight": "norm1.weight",
    "input_layernorm.bias": "norm1.bias",
    "post_attention_layernorm.weight": "norm2.weight",
    "post_attention_layernorm.bias": "norm2.bias",
    "self_attn_layer_scale.scale": "ls1",
    "mlp_layer_scale.scale": "ls2",
    "mlp.fc1.weight": "ffn_up_w",
    "mlp.fc2.weight": "ffn_down_w",
    "self_attn.o_proj.weight": "attn.out_w",
}


def write_csm_rs(
    path: Path, tiny: TinyCsm, kind: str = "q8_0", layout: str = "hf", codec: bool = False
) -> Path:
    """Write a file as csm.rs' scripts/quantize.py does, in blocks of ggml's layout.

    Args:
        path: the file.
        tiny: the model.
        kind: one of `TYPES`; for "f32" and "f16" every tensor.
        layout: "hf" or "original": names of the checkpoint that is converted.
        codec: whether the checkpoint holds the codec, as transformers' does.
    """
    tensors = {n: t for n, t in tiny.tensors.items() if not n.startswith(CODEC)}
    if layout == "original":
        tensors = original_tensors(tensors, tiny.shape)
    if codec:
        tensors |= {n: t for n, t in tiny.tensors.items() if n.startswith(CODEC)}
    gguf = _gguf()
    writer = gguf.GGUFWriter(str(path), "csm")
    writer.add_uint32("general.quantization_version", 2)
    # The script writes CSM-1B's sizes whatever it converts.
    writer.add_uint32("csm.embedding_length", 2048)
    writer.add_uint32("csm.backbone.block_count", 16)
    writer.add_uint32("csm.decoder.block_count", 4)
    writer.add_uint32("csm.audio_num_codebooks", 32)
    writer.add_uint32("csm.audio_vocab_size", 2051)
    writer.add_uint32("csm.text_vocab_size", 128256)
    for name, tensor in tensors.items():
        is_matrix = name.endswith(".weight") and tensor.dim() == 2
        if is_matrix and "norm" not in name and "embeddings" not in name:
            add(writer, name, tensor, kind)
        else:
            add(writer, name, tensor, "f32" if kind == "f32" else "f16")
    return close(writer, path)


def write_crispasr(
    path: Path, tiny: TinyCsm, kind: str = "f16", tokenizer: bool = True, codec: bool = True
) -> Path:
    """Write a file as CrispASR's converter and quantizer do.

    Args:
        path: the file.
        tiny: the model.
        kind: one of `TYPES`.
        tokenizer: whether tokens and merges are in it.
        codec: whether the codec is in it.
    """
    gguf = _gguf()
    writer = gguf.GGUFWriter(str(path), "csm-tts")
    writer.add_name("csm-1b")
    add_metadata(writer, tiny)
    if tokenizer:
        settings = json.loads(tiny.tokenizer.to_str())
        ids = settings["model"]["vocab"]
        ids |= {token["content"]: token["id"] for token in settings["added_tokens"]}
        writer.add_token_list(sorted(ids, key=ids.__getitem__))
        writer.add_token_merges([" ".join(pair) for pair in settings["model"]["merges"]])
    for name, tensor in crispasr_tensors(tiny, codec).items():
        is_weight = "weight" in name or name.endswith("_w")
        while kind not in ("f32", "f16") and tensor.dim() > 1 and tensor.shape[0] == 1:
            tensor = tensor[0]  # ggml's count of dimensions leaves these out
        if tensor.dim() <= 1:
            add(writer, name, tensor, "f32")
        elif tensor.dim() == 2 and is_weight and "norm" not in name:
            add(writer, name, tensor, kind)
        else:
            add(writer, name, tensor, "f32" if kind == "f32" else "f16")
    return close(writer, path)


def crispasr_tensors(tiny: TinyCsm, codec: bool = True) -> dict[str, Tensor]:
    """A model's tensors by CrispASR's names, as its converter makes them."""
    out: dict[str, Tensor] = {}
    for name, tensor in tiny.tensors.items():
        if new := _CRISPASR_MODEL.get(name):
            out[new] = tensor
        elif match := re.fullmatch(
            r"(backbone_model|depth_decoder\.model)\.layers\.(\d+)\.(.+)\.weight", name
        ):
            part = "backbone" if match[1] == "backbone_model" else "depth"
            out[f"{part}.blk.{match[2]}.{_CRISPASR_LAYER[match[3]]}.weight"] = tensor
        elif not name.startswith(CODEC):
            raise AssertionError(name)
    if codec:
        inside = {n.removeprefix(CODEC): t for n, t in tiny.tensors.items() if n.startswith(CODEC)}
        out |= _crispasr_codec(inside)
    return out


def _crispasr_codec(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(en|de)coder_transformer\.layers\.(\d+)\.(.+)", name):
            layer = f"mimi.{match[1]}c_tfm.layers.{match[2]}."
            if match[3] == "self_attn.q_proj.weight":
                parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                out[f"{layer}attn.qkv_w"] = torch.cat(parts)
            elif match[3] in _CRISPASR_CODEC_LAYER:
                out[f"{layer}{_CRISPASR_CODEC_LAYER[match[3]]}"] = tensor
        elif match := re.fullmatch(r"(\w+coder)\.layers\.(\d+)\.block\.(\d+)\.conv\.(\w+)", name):
            out[f"mimi.{match[1]}.model.{match[2]}.blk{match[3]}.{match[4]}"] = tensor
        elif match := re.fullmatch(r"(\w+coder)\.layers\.(\d+)\.conv\.(\w+)", name):
            out[f"mimi.{match[1]}.model.{match[2]}.conv2.{match[3]}"] = tensor
        elif match := re.fullmatch(r"(down|up)sample\.conv\.weight", name):
            out[f"mimi.{match[1]}sample.conv3.weight"] = tensor
        elif match := re.fullmatch(
            r"quantizer\.(semantic|acoustic)_residual_vector_quantizer\.(.+)", name
        ):
            chain = f"mimi.quantizer.rvq_{'first' if match[1] == 'semantic' else 'rest'}."
            if book := re.fullmatch(r"layers\.(\d+)\.codebook\.embed_sum", match[2]):
                usage = tensors[name.replace("embed_sum", "cluster_usage")].clamp(min=1e-5)
                out[f"{chain}vq.layers.{book[1]}._codebook.embedding"] = tensor / usage[:, None]
            elif match[2].endswith("proj.weight"):
                out[f"{chain}{match[2]}"] = tensor
        else:
            raise AssertionError(name)
    return out


def add_metadata(writer, tiny: TinyCsm) -> None:
    """Add the keys of CrispASR's converter."""
    config = tiny.config
    depth, codec = config["depth_decoder_config"], config["codec_config"]
    for part, settings in (("backbone", config), ("depth", depth)):
        for key, name in (
            ("n_layers", "num_hidden_layers"),
            ("d_model", "hidden_size"),
            ("n_heads", "num_attention_heads"),
            ("n_kv_heads", "num_key_value_heads"),
            ("head_dim", "head_dim"),
            ("ff_dim", "intermediate_size"),
        ):
            writer.add_uint32(f"csm.{part}.{key}", settings[name])
    writer.add_uint32("csm.backbone.max_pos", config["max_position_embeddings"])
    writer.add_float32("csm.backbone.rope_theta", config.get("rope_theta", 500000.0))
    writer.add_float32("csm.backbone.rms_norm_eps", config["rms_norm_eps"])
    writer.add_uint32("csm.depth.backbone_hidden", config["hidden_size"])
    writer.add_uint32("csm.text_vocab_size", config["text_vocab_size"])
    # The converter looks for keys that transformers' config.json does not have.
    writer.add_uint32("csm.audio_vocab_size", config.get("audio_vocab_size", 2051))
    writer.add_uint32("csm.audio_num_codebooks", config.get("audio_num_codebooks", 32))
    writer.add_uint32("csm.audio_eos_token_id", config["audio_eos_token_id"])
    writer.add_uint32("csm.audio_token_id", config["audio_token_id"])
    writer.add_uint32("csm.bos_token_id", config["bos_token_id"])
    writer.add_uint32("csm.codebook_eos_token_id", config["codebook_eos_token_id"])
    writer.add_uint32("csm.codebook_pad_token_id", config["codebook_pad_token_id"])
    writer.add_uint32("csm.mimi.dim", codec["hidden_size"])
    writer.add_uint32("csm.mimi.n_heads", codec["num_attention_heads"])
    writer.add_uint32("csm.mimi.n_layers", codec["num_hidden_layers"])
    writer.add_uint32("csm.mimi.codebook_dim", codec["codebook_dim"])
    writer.add_uint32("csm.mimi.codebook_size", codec["codebook_size"])
    writer.add_uint32("csm.mimi.n_quantizers", codec["num_quantizers"])
    writer.add_uint32("csm.mimi.n_semantic", 1)
    writer.add_uint32("csm.mimi.sample_rate", 24000)
    writer.add_float32("csm.mimi.frame_rate", 12.5)


def add(writer, name: str, tensor: Tensor, kind: str) -> None:
    """Add a tensor in a type, or in the one that `fitting` gives."""
    values = np.ascontiguousarray(tensor.detach().float().numpy())
    kind = fitting(values.shape, kind)
    if kind in ("f32", "f16"):
        writer.add_tensor(name, values if kind == "f32" else values.astype(np.float16))
    else:
        type_ = _gguf().GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, _blocks(values, kind), raw_dtype=type_)


def fitting(shape: tuple[int, ...], kind: str) -> str:
    """A type for tensors of a shape: float16 if no smaller block divides its rows."""
    if kind == "q4_k" and shape[-1] % 256:
        kind = "q4_0"  # crispasr-quantize's choice too
    return "f16" if kind in ("q8_0", "q4_0") and shape[-1] % 32 else kind


def held(tiny: TinyCsm, kind: str, names: str, folder: Path) -> TinyCsm:
    """The model whose weights are those that a file holds; the codec's are unchanged.

    Args:
        tiny: the model that was written.
        kind: one of `TYPES`.
        names: "hf" or "original" for csm.rs' files, or "crispasr".
        folder: a new folder for files.
    """
    from transformers import CsmForConditionalGeneration

    tensors = {}
    for name, tensor in tiny.tensors.items():
        is_matrix = name.endswith(".weight") and tensor.dim() == 2 and "norm" not in name
        is_table = "embed" in name and "projector" not in name
        if name.startswith(CODEC) or (names == "crispasr" and tensor.dim() == 1):
            tensors[name] = tensor
        elif is_matrix and not (is_table and names == "original"):
            tensors[name] = held_values(tensor, kind)
        else:
            tensors[name] = held_values(tensor, "f32" if kind == "f32" else "f16")
    changed = replace(tiny, tensors=tensors)
    model = CsmForConditionalGeneration.from_pretrained(changed.write(folder)).eval()
    return replace(changed, model=model.requires_grad_(False))


def held_values(tensor: Tensor, kind: str) -> Tensor:
    """The values that a file holds of a tensor, float32."""
    kind = fitting(tuple(tensor.shape), kind)
    if kind in ("f32", "f16"):
        return tensor.to(torch.float16).float() if kind == "f16" else tensor
    values = np.ascontiguousarray(tensor.float().numpy())
    type_ = _gguf().GGMLQuantizationType[kind.upper()]
    return torch.from_numpy(_gguf().quants.dequantize(_blocks(values, kind), type_))


def _blocks(values: np.ndarray, kind: str) -> np.ndarray:
    gguf = _gguf()
    if kind == "q4_k":
        return q4_k(values)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])


def q4_k(values: np.ndarray) -> np.ndarray:
    """Round `[N, C]` to Q4_K blocks, uint8 `[N, 144 C / 256]`; the package has no writer of them.

    Each group of 32 values is `d * scale * q - dmin * min`, with 6 bits for scale and min and 4 for
    q. Layout: d, dmin (float16), 12 bytes of scales and minima, 128 bytes of q.
    """
    groups = values.reshape(-1, 8, 32).astype(np.float64)
    low = np.minimum(groups.min(-1), 0)
    step = np.maximum((groups.max(-1) - low) / 15, 1e-12)
    d = (step.max(-1, keepdims=True) / 63).astype(np.float16)
    dmin = (-low.min(-1, keepdims=True) / 63).astype(np.float16)
    scales = np.clip(np.rint(step / np.maximum(d, 1e-7)), 1, 63).astype(np.uint8)
    minima = np.clip(np.rint(-low / np.maximum(dmin, 1e-7)), 0, 63).astype(np.uint8)
    exact_step = d.astype(np.float64) * scales
    exact_low = dmin.astype(np.float64) * minima
    q = np.rint((groups + exact_low[..., None]) / exact_step[..., None])
    q = np.clip(q, 0, 15).astype(np.uint8)
    packed = np.empty((len(groups), 12), np.uint8)
    packed[:, 0:4] = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    packed[:, 4:8] = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    packed[:, 8:12] = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    pairs = q.reshape(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, nibbles], axis=1)
    return blocks.reshape(*values.shape[:-1], -1)


def _gguf():
    """The package, imported with its module of blocks."""
    return pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")


def close(writer, path: Path) -> Path:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
