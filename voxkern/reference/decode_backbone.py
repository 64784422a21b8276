from torch import Tensor

from voxkern.reference.add_rms_norm import add_rms_norm
from voxkern.reference.append_kv import append_kv
from voxkern.reference.decode_attention import decode_attention
from voxkern.reference.linear import linear, project
from voxkern.reference.rms_norm import rms_norm
from voxkern.reference.silu_mul import silu_mul


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
    head_dim = rope_table.shape[1]
    residual = x.clone()
    for i in range(len(qkv)):
        if i == 0:
            x = rms_norm(residual, attn_norm[i], eps)
        else:
            x = add_rms_norm(x, residual, attn_norm[i], eps)
        q, k, v = (
            project(x, qkv[i], (num_heads + 2 * num_kv_heads) * head_dim)
            .unflatten(-1, (-1, head_dim))
            .split((num_heads, num_kv_heads, num_kv_heads), 1)
        )
        append_kv(q, k, v, rope_table, positions, slots, k_pages[i], v_pages[i])
        attended = decode_attention(q, k_pages[i], v_pages[i], page_table, seq_lens, head_dim**-0.5)
        x = project(attended.flatten(1), o[i], len(norm))
        x = add_rms_norm(x, residual, mlp_norm[i], eps)
        x = project(silu_mul(linear(x, gate_up[i])), down[i], len(norm))
    return add_rms_norm(x, residual, norm, eps) if len(qkv) else rms_norm(residual, norm, eps)
