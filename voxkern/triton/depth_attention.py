"""append_kv and decode_attention of one position in one launch, for the depth decoder: its cache
lives for one call, and one program holds all keys of a head in registers."""

import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.language import INTERPRETED, MAX_ELEMENTS, load, rounded, store, tile_size


@triton.jit(do_not_specialize=["position", "count"])
def depth_attention_kernel(
    qkv,
    rope_table,
    k_cache,
    v_cache,
    scale,
    out,
    position,
    count,
    Hq,
    Hkv,
    K,
    D,
    HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program handles HEADS of the `count` query heads of all rows (1, more only under the
    interpreter), with all their keys.

    It rotates its queries and the new keys and uses them from registers. The first query head of
    each group also writes the new keys and values to the cache `[B, Hkv, K, D]`. Float32
    throughout: queries and keys are rounded as append_kv stores them, the result once.
    """
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    group = Hq // Hkv
    b, h = head // Hq, head % Hq
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < count) & (column < D)
    low = column < D // 2
    partner = tl.where(low, column + D // 2, column - D // 2)
    angle = rope_table + position * D + tl.where(low, column, partner)
    cos = load(angle, column < D)
    sin = load(angle + D // 2, column < D)
    sin = tl.where(low, -sin, sin)

    row = qkv + b * (Hq + 2 * Hkv) * D
    q, new_k = row + h * D, row + (Hq + h // group) * D
    queries = load(q + column, inside) * cos + load(q + partner, inside) * sin
    queries = rounded(queries, qkv) * scale
    keys = load(new_k + column, inside) * cos + load(new_k + partner, inside) * sin
    keys = rounded(keys, qkv)
    values = load(new_k + Hkv * D + column, inside)
    offset = (b * Hkv + h // group) * K * D + column
    first = inside & (h % group == 0)
    store(k_cache + offset + position * D, keys, first)
    store(v_cache + offset + position * D, values, first)

    key = tl.arange(0, BLOCK_K)[None, :, None]
    offset = offset[:, None, :] + key * D
    cached = inside[:, None, :] & (key < position)
    keys = tl.where(key == position, keys[:, None, :], load(k_cache + offset, cached))
    values = tl.where(key == position, values[:, None, :], load(v_cache + offset, cached))
    scores = tl.sum(queries[:, None, :] * keys, 2)
    scores = tl.where(tl.arange(0, BLOCK_K)[None, :] <= position, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights[:, :, None] * values, 1) / tl.sum(weights, 1)[:, None]
    store(out + head * D + column, total, inside)


def launch_depth_attention(
    qkv: Tensor,
    rope_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int,
    out: Tensor,
) -> None:
    """Write out `[B, Hq D]` from qkv `[B, (Hq + 2 Hkv) D]` and caches `[B, Hkv, K, D]`, all
    contiguous."""
    _, kv_heads, keys, head_dim = k_cache.shape
    rows, heads = out.shape[0], out.shape[1] // head_dim
    heads_per_program = 1
    if INTERPRETED.value:
        most = max(1, MAX_ELEMENTS // (tile_size(keys) * tile_size(head_dim)))
        heads_per_program = min(tile_size(rows * heads), most)
    depth_attention_kernel[(triton.cdiv(rows * heads, heads_per_program),)](
        qkv,
        rope_table,
        k_cache,
        v_cache,
        head_dim**-0.5,
        out,
        position,
        rows * heads,
        heads,
        kv_heads,
        keys,
        head_dim,
        HEADS=heads_per_program,
        BLOCK_K=tile_size(keys),
        BLOCK_D=tile_size(head_dim),
        num_warps=4,  # CSM's 32 keys and values of width 128 take 64 registers per thread
    )
