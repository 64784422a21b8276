import torch
from torch import Tensor

from voxkern.triton.checks import check, check_dim, check_float, check_operand
from voxkern.triton.layers import Layers, Places


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
    check_float(x, "x")
    check_dim(x, "x", 2)
    layers = Layers(
        *(attn_norm, qkv, o, mlp_norm, gate_up, down, norm, rope_table),
        *(num_heads, num_kv_heads, eps),
    )
    layers.check(x, x.shape[1])
    rows = (x.shape[0],)
    check_operand(positions, "positions", x, torch.int64, "[B]", rows)
    check_operand(slots, "slots", x, torch.int64, "[B]", rows)
    pages = len(qkv), None, num_kv_heads, None, rope_table.shape[1]
    check_operand(k_pages, "k_pages", x, x.dtype, "[L, P, Hkv, S, D]", pages)
    shape = list(k_pages.shape)
    check(shape[3] >= 1, f"k_pages: expected a page size S >= 1, got shape {shape}")
    check_operand(v_pages, "v_pages", x, x.dtype, "k_pages' shape", shape)
    check_operand(page_table, "page_table", x, torch.int32, "[B, M]", (*rows, None))
    check_operand(seq_lens, "seq_lens", x, torch.int32, "[B]", rows)
    residual = x.clone(memory_format=torch.contiguous_format)
    return layers.run(residual, Places(positions, slots, k_pages, v_pages, page_table, seq_lens))
