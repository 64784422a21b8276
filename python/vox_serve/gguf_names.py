"""Names of CSM's tensors in GGUF files, translated to those of safetensors checkpoints.

Two projects write such files (docs/models.md has the revisions that were read):

- csm.rs keeps the names of the checkpoint it converts, transformers' or the original ones, and
  with them the layout: q and k of transformers' names are half-split, of the original ones
  interleaved.
- CrispASR converts a checkpoint of transformers' and gives its tensors names of its own. q and k
  keep their half-split rows. The attention of the codec's transformers is fused to q, k and v, and
  the codebooks are divided by their usage. Its quantizer drops leading dimensions of 1.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from vox_serve.checkpoint import CODEC_PREFIX
from vox_serve.gguf_header import TensorPlace


class Place(NamedTuple):
    """The place of a tensor's values in a file.

    Attributes:
        source: name of the tensor in the file.
        shape: the tensor's shape.
        part: the tensor is this one of `parts` equal groups of rows of the source.
        parts: number of those groups.
    """

    source: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1


_MARK = "backbone.codebook0_head.weight"
"""A tensor that every CSM of CrispASR has, and none of csm.rs."""

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_MODEL = {
    "backbone.audio_embd.weight": "backbone_model.embed_tokens.embed_audio_tokens.weight",
    "backbone.text_embd.weight": "embed_text_tokens.weight",
    _MARK: "lm_head.weight",
    "backbone.output_norm.weight": "backbone_model.norm.weight",
    "depth.codebooks_head.weight": "depth_decoder.codebooks_head.weight",
    "depth.token_embd.weight": "depth_decoder.model.embed_tokens.weight",
    "depth.projection.weight": "depth_decoder.model.inputs_embeds_projector.weight",
    "depth.output_norm.weight": "depth_decoder.model.norm.weight",
}

_CODEC_LAYER = {
    "norm1.weight": "input_layernorm.weight",
    "norm1.bias": "input_layernorm.bias",
    "norm2.weight": "post_attention_layernorm.weight",
    "norm2.bias": "post_attention_layernorm.bias",
    "ls1": "self_attn_layer_scale.scale",
    "ls2": "mlp_layer_scale.scale",
    "ffn_up_w": "mlp.fc1.weight",
    "ffn_down_w": "mlp.fc2.weight",
    "attn.out_w": "self_attn.o_proj.weight",
    "attn.q_w": "self_attn.q_proj.weight",
    "attn.k_w": "self_attn.k_proj.weight",
    "attn.v_w": "self_attn.v_proj.weight",
}

_BLOCK = re.compile(r"(backbone|depth)\.blk\.(\d+)\.(\w+)\.(.+)")
_PARTS = {"backbone": "backbone_model.", "depth": "depth_decoder.model."}
_CODEC_BLOCK = re.compile(r"mimi\.(enc|dec)_tfm\.layers\.(\d+)\.(.+)")
_CODEC_PARTS = {"enc": "encoder_transformer", "dec": "decoder_transformer"}
_CONVOLUTION = re.compile(r"mimi\.(encoder|decoder)\.model\.(\d+)\.(?:conv2|blk(\d+))\.(\w+)")
_RESAMPLING = re.compile(r"mimi\.(downsample|upsample)\.conv3\.(\w+)")
_QUANTIZER = re.compile(r"mimi\.quantizer\.rvq_(first|rest)\.(.+)")
_QUANTIZERS = {"first": "semantic", "rest": "acoustic"}
_CODEBOOK = re.compile(r"vq\.layers\.(\d+)\._codebook\.embedding")


def is_crispasr(tensors: Mapping[str, TensorPlace]) -> bool:
    """True if a file's tensors have CrispASR's names of a CSM."""
    return _MARK in tensors


def places(tensors: Mapping[str, TensorPlace]) -> dict[str, Place]:
    """Where the values of each tensor are, by its name in a safetensors checkpoint.

    A tensor whose name is of no known kind keeps it.

    Args:
        tensors: a file's tensors by the names in it.

    Raises:
        ValueError: two tensors are meant for one name; the message names them.
    """
    found: dict[str, Place] = {}
    for source, place in tensors.items():
        named = _renamed(source, place.shape) if is_crispasr(tensors) else None
        for name, target in (named or {source: Place(source, place.shape)}).items():
            if name in found:
                raise ValueError(f"tensors {found[name].source} and {source} are both {name}")
            found[name] = target
    return found


def usage_of(name: str) -> str | None:
    """The tensor that a codebook of the codec is divided by; None if the name is no codebook's."""
    suffix = ".codebook.embed_sum"
    return f"{name.removesuffix(suffix)}.codebook.cluster_usage" if name.endswith(suffix) else None


def _renamed(source: str, shape: tuple[int, ...]) -> dict[str, Place]:
    """Transformers' names of one of CrispASR's tensors; {} if the name is of no known kind."""
    if name := _MODEL.get(source):
        if name == "depth_decoder.codebooks_head.weight":
            shape = _padded(shape, 3)
        return {name: Place(source, shape)}
    if match := _BLOCK.fullmatch(source):
        part, index, kind, rest = match.groups()
        return {
            f"{_PARTS[part]}layers.{index}.{_LAYER.get(kind, kind)}.{rest}": Place(source, shape)
        }
    return {f"{CODEC_PREFIX}{name}": place for name, place in _codec(source, shape).items()}


def _codec(source: str, shape: tuple[int, ...]) -> dict[str, Place]:
    """The same for the codec, without its prefix."""
    if match := _CODEC_BLOCK.fullmatch(source):
        part, index, rest = match.groups()
        layer = f"{_CODEC_PARTS[part]}.layers.{index}."
        if rest == "attn.qkv_w" and len(shape) == 2 and shape[0] % 3 == 0:
            rows = (shape[0] // 3, shape[1])
            return {
                f"{layer}self_attn.{letter}_proj.weight": Place(source, rows, i, 3)
                for i, letter in enumerate("qkv")
            }
        return {f"{layer}{_CODEC_LAYER.get(rest, rest)}": Place(source, shape)}
    if match := _CONVOLUTION.fullmatch(source):
        part, index, block, kind = match.groups()
        unit = f"block.{block}." if block else ""
        return {f"{part}.layers.{index}.{unit}conv.{kind}": _convolution(source, shape, kind)}
    if match := _RESAMPLING.fullmatch(source):
        part, kind = match.groups()
        return {f"{part}.conv.{kind}": _convolution(source, shape, kind)}
    if match := _QUANTIZER.fullmatch(source):
        part, rest = match.groups()
        chain = f"quantizer.{_QUANTIZERS[part]}_residual_vector_quantizer."
        if book := _CODEBOOK.fullmatch(rest):
            return {f"{chain}layers.{book[1]}.codebook.embed_sum": Place(source, shape)}
        return {f"{chain}{rest}": _convolution(source, shape, rest.rpartition(".")[2])}
    return {}


def _convolution(source: str, shape: tuple[int, ...], kind: str) -> Place:
    return Place(source, _padded(shape, 3) if kind == "weight" else shape)


def _padded(shape: tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """A shape with the leading ones that a quantizer dropped."""
    return (1,) * (dimensions - len(shape)) + shape
