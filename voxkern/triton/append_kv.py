import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check, check_float, check_heads, check_operand, check_pages
from voxkern.triton.language import load, store, tile_size


@triton.jit
def append_kv_kernel(
    q,
    q_stride,
    k,
    k_stride,
    v,
    v_stride,
    rope_table,
    positions,
    slots,
    k_pages,
    v_pages,
    Hq,
    Hkv,
    D,
    S,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program handles one token: all heads of its q, k and v, as halves `[heads, D / 2]`.

    Angles and products are float32; results are rounded once.
    """
    token = tl.program_id(0).to(tl.int64)
    half = D // 2
    column = tl.arange(0, BLOCK_HALF)
    in_half = column < half
    angles = rope_table + tl.load(positions + token) * D + column
    cos = load(angles, in_half)[None, :]
    sin = load(angles + half, in_half)[None, :]

    head = tl.arange(0, BLOCK_Q)[:, None]
    inside = (head < Hq) & in_half[None, :]
    pointers = q + token * q_stride + head * D + column[None, :]
    low, high = load(pointers, inside), load(pointers + half, inside)
    store(pointers, low * cos - high * sin, inside)
    store(pointers + half, high * cos + low * sin, inside)

    slot = tl.load(slots + token)
    head = tl.arange(0, BLOCK_KV)[:, None]
    inside = (head < Hkv) & in_half[None, :] & (slot >= 0)
    offset = ((slot // S * Hkv + head) * S + slot % S) * D + column[None, :]
    pointers = k + token * k_stride + head * D + column[None, :]
    low, high = load(pointers, inside), load(pointers + half, inside)
    store(k_pages + offset, low * cos - high * sin, inside)
    store(k_pages + offset + half, high * cos + low * sin, inside)
    pointers = v + token * v_stride + head * D + column[None, :]
    store(v_pages + offset, load(pointers, inside), inside)
    store(v_pages + offset + half, load(pointers + half, inside), inside)


def launch_append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> None:
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    if tokens:
        append_kv_kernel[(tokens,)](
            q,
            q.stride(0),
            k,
            k.stride(0),
            v,
            v.stride(0),
            rope_table,
            positions,
            slots,
            k_pages,
            v_pages,
            heads,
            kv_heads,
            head_dim,
            page_size,
            BLOCK_Q=tile_size(heads),
            BLOCK_KV=tile_size(kv_heads),
            BLOCK_HALF=tile_size(head_dim // 2),
            num_warps=4,  # 8 pairs per thread: CSM's queries have 1024
        )


def append_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> None:
    check_float(q, "q")
    check_heads(q, "q", q)
    tokens, heads, head_dim = q.shape
    disjoint = tokens <= 1 or q.stride(0) >= heads * head_dim
    check(disjoint, "q: expected tokens that do not overlap")
    check(head_dim % 2 == 0, f"q: expected an even head width D, got shape {list(q.shape)}")
    check_pages(k_pages, v_pages, q)
    for name, t in (("k", k), ("v", v)):
        check_heads(t, name, q, "[T, Hkv, D]", (tokens, k_pages.shape[1], head_dim))
    check_operand(
        rope_table, "rope_table", q, torch.float32, "[max_positions, D]", (None, head_dim)
    )
    check_operand(positions, "positions", q, torch.int64, "[T]", (tokens,))
    check_operand(slots, "slots", q, torch.int64, "[T]", (tokens,))
    launch_append_kv(q, k, v, rope_table, positions, slots, k_pages, v_pages)
