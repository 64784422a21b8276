"""Each layer takes six or seven launches, nine or ten with more than 16 rows: the GEMMs of
layers.py, one append_kv, and one decode_attention, or two launches of it if a sequence may have
several splits.

Estimated us per layer at batch 1 in bfloat16 on an H100, at 3.35 TB/s (not measured):

    launch                  programs     weights
    norm, qkv                    192     12.6 MB   3.8
    append_kv                      1         -     about 2
    decode_attention, two   8 a split        -     about 5
    o, residual                  128      8.4 MB   2.5
    norm, gate, up, SwiGLU       512     67.1 MB  20.0
    down, residual               128     33.6 MB  10.0

16 layers and the last norm are 113 launches (162 with one launch per op). Memory traffic takes
580 us; each launch adds the 1 to 2 us before its first bytes arrive.
"""

import torch
from torch import Tensor

from voxkern.triton.append_kv import launch_append_kv
from voxkern.triton.checks import check, check_dim, check_float, check_operand
from voxkern.triton.decode_attention import launch_decode_attention
from voxkern.triton.layers import Layers
from voxkern.triton.rms_norm import launch_rms_norm


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

    def attend(layer: int, qkv: Tensor, attended: Tensor) -> None:
        q, k, v = layers.split_heads(qkv)
        k_layer, v_layer = k_pages[layer], v_pages[layer]
        launch_append_kv(q, k, v, rope_table, positions, slots, k_layer, v_layer)
        out, scale = attended.view(q.shape), layers.head_dim**-0.5
        launch_decode_attention(q, k_layer, v_layer, page_table, seq_lens, scale, out)

    residual = layers.run(x.contiguous(), attend)
    out = torch.empty_like(residual)
    launch_rms_norm(residual, None, norm, eps, out)
    return out
