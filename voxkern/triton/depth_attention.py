"""append_kv and decode_attention of one position for keys that a program holds in its registers:
the depth decoder's, whose cache lives for one call."""

import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.language import INTERPRETED, MOST_ELEMENTS, load, rounded, store, tile


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
    """A program takes HEADS of all rows' `count` query heads (1, but when interpreted) and all
    their keys.

    It rotates its queries and the new keys, and uses those from its registers; the first query head
    of a group also writes them, and their values, to the cache `[B, Hkv, K, D]`. Float32
    throughout, queries and keys rounded where append_kv stores them, the result once.
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
    place = (b * Hkv + h // group) * K * D + column
    first = inside & (h % group == 0)
    store(k_cache + place + position * D, keys, first)
    store(v_cache + place + position * D, values, first)

    key = tl.arange(0, BLOCK_K)[None, :, None]
    place = place[:, None, :] + key * D
    before = inside[:, None, :] & (key < position)
    keys = tl.where(key == position, keys[:, None, :], load(k_cache + place, before))
    values = tl.where(key == position, values[:, None, :], load(v_cache + place, before))
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
    """out `[B, Hq D]` of qkv `[B, (Hq + 2 Hkv) D]` and caches `[B, Hkv, K, D]`, all contiguous."""
    _, kv_heads, keys, head_dim = k_cache.shape
    rows, heads = out.shape[0], out.shape[1] // head_dim
    at_once = 1
    if INTERPRETED.value:
        at_once = min(tile(rows * heads), max(1, MOST_ELEMENTS // (tile(keys) * tile(head_dim))))
    depth_attention_kernel[(triton.cdiv(rows * heads, at_once),)](
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
        HEADS=at_once,
        BLOCK_K=tile(keys),
        BLOCK_D=tile(head_dim),
        num_warps=4,  # CSM's 32 keys and values of 128 are 64 registers of a thread
    )
