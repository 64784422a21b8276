import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check_attention, check_operand
from voxkern.triton.decode_attention import attend_keys, merge, split_keys
from voxkern.triton.language import INTERPRETED, store, tile_size


@triton.jit(do_not_specialize=["B", "M"])
def prefill_attention_kernel(
    q,
    q_stride,
    k_pages,
    v_pages,
    page_table,
    cu_seqlens,
    seq_lens,
    scale,
    out,
    B,
    Hq,
    Hkv,
    S,
    M,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program handles BLOCK_Q queries of one sequence and head, and all keys up to the last one
    that any of them sees, BLOCK_K at a time: the splits of decode_attention, merged in order, so
    that a query has the bits that decode_attention gives at its position.

    The host does not know the sequences' lengths: the grid has room for the maximum number of
    tiles, and each program finds its own. Masked keys change no bit of a query's result.
    """
    b = tl.arange(0, BLOCK_B)
    starts = tl.load(cu_seqlens + b, mask=b < B, other=0)
    ends = tl.load(cu_seqlens + b + 1, mask=b < B, other=0)
    tiles = (ends - starts + BLOCK_Q - 1) // BLOCK_Q
    tile_ends = tl.cumsum(tiles, 0)
    sequence = tl.sum((tile_ends <= tl.program_id(0)).to(tl.int32), 0)
    if sequence >= B:
        return
    is_mine = b == sequence
    first = (tl.program_id(0) - tl.sum(tl.where(is_mine, tile_ends - tiles, 0), 0)) * BLOCK_Q
    start = tl.sum(tl.where(is_mine, starts, 0), 0)
    queries = tl.sum(tl.where(is_mine, ends - starts, 0), 0)
    length = tl.minimum(tl.load(seq_lens + sequence), M * S)
    table = page_table + sequence.to(tl.int64) * M

    head = tl.program_id(1)
    kv_head = head // (Hq // Hkv)
    query = first + tl.arange(0, BLOCK_Q)
    column = tl.arange(0, BLOCK_D)
    valid = (query < queries)[:, None] & (column < D)[None, :]
    token = (start + query).to(tl.int64)[:, None]
    rows = tl.load(q + token * q_stride + head * D + column[None, :], mask=valid, other=0.0)
    position = length - queries + query

    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    last = tl.minimum(length, length - queries + first + BLOCK_Q)
    for begin in range(0, last, BLOCK_K):
        key = begin + tl.arange(0, BLOCK_K)
        page = tl.load(table + key // S, mask=key < last, other=0).to(tl.int64)
        offset = ((page * Hkv + kv_head) * S + key % S) * D
        inside = (key < last)[:, None] & (column < D)[None, :]
        k = tl.load(k_pages + offset[:, None] + column[None, :], mask=inside, other=0.0)
        v = tl.load(v_pages + offset[:, None] + column[None, :], mask=inside, other=0.0)
        visible = key[None, :] <= position[:, None]
        split_total, split_largest, split_weight = attend_keys(rows, k, v, visible, scale)
        total, largest, weight = merge(
            total, largest, weight, split_total, split_largest, split_weight
        )
    pointers = out + (token * Hq + head) * D + column[None, :]
    store(pointers, total / weight[:, None], valid)


def block_q(dtype: torch.dtype) -> int:
    """Queries per program: in bfloat16 to suit tensor cores, in float32 what registers hold."""
    if INTERPRETED.value:
        return 64
    return 64 if dtype == torch.bfloat16 else 16


def launch_prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    batch, pages = page_table.shape
    block = block_q(q.dtype)
    if not out.numel():
        return
    # Upper bound on the tiles: each sequence may end in a partial one.
    prefill_attention_kernel[(tokens // block + batch, heads)](
        q,
        q.stride(0),
        k_pages,
        v_pages,
        page_table,
        cu_seqlens,
        seq_lens,
        scale,
        out,
        batch,
        heads,
        kv_heads,
        page_size,
        pages,
        D=head_dim,
        BLOCK_B=tile_size(batch, 64),
        BLOCK_Q=block,
        BLOCK_K=split_keys(head_dim),
        BLOCK_D=tile_size(head_dim, 16),
        num_warps=4,  # 16 of 64 queries per warp, the rows of one tensor core instruction
        num_stages=2,  # load the next keys and values while these are multiplied
    )


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    check_attention(q, k_pages, v_pages, page_table)
    batch = page_table.shape[0]
    check_operand(cu_seqlens, "cu_seqlens", q, torch.int32, "[B + 1]", (batch + 1,))
    check_operand(seq_lens, "seq_lens", q, torch.int32, "[B]", (batch,))
    out = q.new_empty(q.shape)
    launch_prefill_attention(q, k_pages, v_pages, page_table, cu_seqlens, seq_lens, scale, out)
    return out
