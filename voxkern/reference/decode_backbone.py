from torch import Tensor

from voxkern.layers import LlamaLayers
from voxkern.reference.append_kv import append_kv
from voxkern.reference.decode_attention import decode_attention
from voxkern.reference.layers import run_layers
from voxkern.reference.rms_norm import rms_norm


def decode_backbone(
    x: Tensor,
    attn_norm: Tensor,
    qkv: Tensor,
    o: Tensor,
    mlp_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    norm: Tensor,
    rope_table: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """The composition of the other ops."""
    weights = (attn_norm, qkv, o, mlp_norm, gate_up, down, norm, rope_table)
    layers = LlamaLayers(*weights, num_heads, num_kv_heads, eps)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = k_pages[layer], v_pages[layer]
        append_kv(q, k, v, rope_table, positions, slots, *pages)
        return decode_attention(q, *pages, page_table, seq_lens, layers.head_dim**-0.5)

    return rms_norm(run_layers(layers, x, attend), norm, eps)
