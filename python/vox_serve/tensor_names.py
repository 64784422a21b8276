"""Tensor names of the formats of CSM checkpoints: transformers', the original, and MLX's."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class TensorNames:
    """Names of CSM's tensors in one format.

    Attributes:
        backbone, depth: prefixes of the two transformers.
        layer: names within a layer.
        interleaved_rope: the two rows of a rotary pair in q and k are adjacent; otherwise they are
            half a head apart.
        The others are names of tensors; `norm` follows a transformer's prefix.
    """

    backbone: str
    depth: str
    layer: dict[str, str] = field(hash=False)
    norm: str
    text_table: str
    audio_table: str
    depth_audio_table: str
    code0_head: str
    projection: str
    code_heads: str  # [K - 1, Cd, V] in both formats
    interleaved_rope: bool

    @property
    def marks(self) -> tuple[str, ...]:
        """Names of the tensors that a CSM has once."""
        norms = (f"{self.backbone}{self.norm}", f"{self.depth}{self.norm}")
        heads = (self.code0_head, self.projection, self.code_heads)
        return (self.text_table, *norms, *heads)


HF = TensorNames(
    backbone="backbone_model.",
    depth="depth_decoder.model.",
    layer={
        "attn_norm": "input_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": "self_attn.o_proj.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
    },
    norm="norm.weight",
    text_table="embed_text_tokens.weight",
    audio_table="backbone_model.embed_tokens.embed_audio_tokens.weight",
    depth_audio_table="depth_decoder.model.embed_tokens.weight",
    code0_head="lm_head.weight",
    projection="depth_decoder.model.inputs_embeds_projector.weight",
    code_heads="depth_decoder.codebooks_head.weight",
    interleaved_rope=False,
)

ORIGINAL = TensorNames(
    backbone="backbone.",
    depth="decoder.",
    layer={
        "attn_norm": "sa_norm.scale",
        "q": "attn.q_proj.weight",
        "k": "attn.k_proj.weight",
        "v": "attn.v_proj.weight",
        "o": "attn.output_proj.weight",
        "mlp_norm": "mlp_norm.scale",
        "gate": "mlp.w1.weight",
        "up": "mlp.w3.weight",
        "down": "mlp.w2.weight",
    },
    norm="norm.scale",
    text_table="text_embeddings.weight",
    audio_table="audio_embeddings.weight",
    depth_audio_table="audio_embeddings.weight",
    code0_head="codebook0_head.weight",
    projection="projection.weight",
    code_heads="audio_head",
    interleaved_rope=True,
)

MLX = replace(ORIGINAL, layer=HF.layer, norm=HF.norm)
"""Conversions for MLX: the original, with transformers' names within a layer."""

_FEWEST_MARKS = 3
"""A CSM has at least so many of a format's `marks`. Other models may have one: `lm_head.weight` is
in every Llama with a head of its own."""

FORMATS = (HF, ORIGINAL, MLX)


def find_names(tensors: Iterable[str]) -> tuple[str, TensorNames] | None:
    """The prefix before all names of a checkpoint's tensors, mostly none, and their format.

    Returns:
        None if they are not a CSM's.
    """
    marks = [(mark, names) for names in FORMATS for mark in names.marks]
    found: Counter[tuple[str, TensorNames]] = Counter()
    for name in tensors:
        for mark, names in marks:
            if name.endswith(mark) and name[: -len(mark)][-1:] in ("", "."):
                found[name[: -len(mark)], names] += 1
    if not found or max(found.values()) < _FEWEST_MARKS:
        return None
    # The most marks decide, then the shortest prefix and the first format.
    return min(found, key=lambda key: (-found[key], len(key[0]), key[0], FORMATS.index(key[1])))
