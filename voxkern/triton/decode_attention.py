import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check_attention, check_operand
from voxkern.triton.language import INTERPRETED, dot, store, sum_in_pairs, tile_size


@triton.jit
def attend_keys(queries, k, v, visible, scale):
    """Attention of queries `[R, D]` to one split of keys and values `[SPLIT, D]`.

    Float32 queries are scaled before their product, the scores of bfloat16 ones after it. Scores
    and sums are float32; weights are rounded to the values' dtype for the product with them, their
    sum is not. The order of a row's sums depends on neither R nor its place in the tile.

    Returns:
        The unnormalised weighted sum of values `[R, D]`, the largest score and the sum of weights;
        zeros, minus infinity and 0 for a row that sees no key.
    """
    zeros = tl.zeros((queries.shape[0], k.shape[0]), tl.float32)
    if queries.dtype == tl.float32:
        scores = dot(queries * scale, tl.trans(k), zeros)
    else:
        scores = dot(queries, tl.trans(k), zeros) * scale
    scores = tl.where(visible, scores, float("-inf"))
    largest = tl.max(scores, 1)
    weights = tl.exp(scores - finite(largest)[:, None])
    total = dot(weights.to(v.dtype), v, tl.zeros((queries.shape[0], v.shape[1]), tl.float32))
    return total, largest, sum_in_pairs(weights)


@triton.jit
def merge(total, largest, weight, split_total, split_largest, split_weight):
    """The results of all splits so far and of the next one, combined. Explicit fma: the compiler
    could otherwise fuse either product of a sum."""
    new = tl.maximum(largest, split_largest)
    old_factor = tl.exp(largest - finite(new))
    factor = tl.exp(split_largest - finite(new))
    total = tl.fma(split_total, factor[:, None] + tl.zeros_like(total), total * old_factor[:, None])
    return total, new, tl.fma(split_weight, factor, weight * old_factor)


@triton.jit
def finite(largest):
    """0 in place of minus infinity, the largest score of no keys."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit(do_not_specialize=["M", "splits"])
def attend_kernel(
    q,
    q_stride,
    k_pages,
    v_pages,
    page_table,
    seq_lens,
    scale,
    sums,
    states,
    out,
    Hkv,
    S,
    M,
    splits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    SINGLE_SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program handles SPLIT keys of one sequence and key/value head, for all its query heads.

    It writes the unnormalised weighted sum of its values to `sums`, and the largest score and the
    sum of weights to `states`. With SINGLE_SPLIT no other program shares the sequence and head,
    and it writes the result to `out`.
    """
    split = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(seq_lens + b), M * S)
    if (not SINGLE_SPLIT) and split * SPLIT >= length:
        return
    key = split * SPLIT + tl.arange(0, SPLIT)
    inside = key < length
    page = tl.load(page_table + b * M + key // S, mask=inside, other=0).to(tl.int64)
    offset = ((page * Hkv + h) * S + key % S) * D
    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < D)[None, :]
    k = tl.load(k_pages + offset[:, None] + column[None, :], mask=mask, other=0.0)
    v = tl.load(v_pages + offset[:, None] + column[None, :], mask=mask, other=0.0)

    g = tl.arange(0, BLOCK_G)
    rows = (g < GROUP)[:, None] & (column < D)[None, :]
    pointers = q + b * q_stride + (h * GROUP + g)[:, None] * D + column[None, :]
    queries = tl.load(pointers, mask=rows, other=0.0)
    total, largest, weight = attend_keys(queries, k, v, inside[None, :], scale)

    row = (b * Hkv + h) * GROUP + g
    if SINGLE_SPLIT:
        total = tl.where(length > 0, total / weight[:, None], 0.0)
        store(out + row[:, None] * D + column[None, :], total, rows)
        return
    row = row * splits + split
    tl.store(sums + row[:, None] * D + column[None, :], total, mask=rows)
    tl.store(states + row * 2, largest, mask=g < GROUP)
    tl.store(states + row * 2 + 1, weight, mask=g < GROUP)


@triton.jit(do_not_specialize=["M", "splits"])
def combine_kernel(
    sums,
    states,
    seq_lens,
    out,
    Hq,
    S,
    M,
    splits,
    D,
    SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS_PER_STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combine the splits in order. One program handles HEADS query heads of a sequence (1, more
    only under the interpreter), with the loads of SPLITS_PER_STEP splits in flight."""
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    row = b * Hq + head
    column = tl.arange(0, BLOCK_D)
    length = tl.minimum(tl.load(seq_lens + b), M * S)
    used = tl.cdiv(length, SPLIT)
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    weight = tl.zeros((HEADS,), tl.float32)
    total = tl.zeros((HEADS, BLOCK_D), tl.float32)
    for first in range(0, used, SPLITS_PER_STEP):
        for i in tl.static_range(SPLITS_PER_STEP):
            index = row * splits + first + i
            mask = (head < Hq) & (first + i < used)
            split_largest = tl.load(states + index * 2, mask=mask, other=float("-inf"))
            split_weight = tl.load(states + index * 2 + 1, mask=mask, other=0.0)
            inside = mask[:, None] & (column < D)[None, :]
            pointers = sums + index[:, None] * D + column[None, :]
            split_total = tl.load(pointers, mask=inside, other=0.0)
            total, largest, weight = merge(
                total, largest, weight, split_total, split_largest, split_weight
            )
    total = total / tl.where(length > 0, weight, 1.0)[:, None]
    inside = (head < Hq)[:, None] & (column < D)[None, :]
    store(out + row[:, None] * D + column[None, :], total, inside)


def split_keys(head_dim: int) -> int:
    """Keys per program: 16 KB of keys and 16 KB of values in float32, so that several programs fit
    on a multiprocessor. It depends on the head width alone, so that neither the batch nor the page
    table changes a result. prefill_attention has the same splits."""
    return max(16, (16384 if INTERPRETED.value else 4096) // tile_size(head_dim, 16))


def launch_decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    batch, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    pages = page_table.shape[1]
    split = split_keys(head_dim)
    splits = triton.cdiv(pages * page_size, split)
    if not out.numel():
        return
    single_split = splits == 1
    parts = 0 if single_split else batch * heads * splits
    sums = torch.empty(parts * head_dim, dtype=torch.float32, device=q.device)
    states = torch.empty(parts * 2, dtype=torch.float32, device=q.device)
    if splits:
        attend_kernel[(splits, kv_heads, batch)](
            q,
            q.stride(0),
            k_pages,
            v_pages,
            page_table,
            seq_lens,
            scale,
            sums,
            states,
            out,
            kv_heads,
            page_size,
            pages,
            splits,
            GROUP=heads // kv_heads,
            D=head_dim,
            SPLIT=split,
            SINGLE_SPLIT=single_split,
            BLOCK_G=tile_size(heads // kv_heads, 1 if q.dtype == torch.float32 else 16),
            BLOCK_D=tile_size(head_dim, 16),
            num_warps=4,  # 32 elements of keys and 32 of values per thread
        )
    if single_split:
        return
    heads_per_program = tile_size(heads) if INTERPRETED.value else 1
    combine_kernel[(triton.cdiv(heads, heads_per_program), batch)](
        sums,
        states,
        seq_lens,
        out,
        heads,
        page_size,
        pages,
        splits,
        head_dim,
        SPLIT=split,
        HEADS=heads_per_program,
        SPLITS_PER_STEP=2 if INTERPRETED.value else 16,  # CSM's longest sequence has 32 splits
        BLOCK_D=tile_size(head_dim),
        num_warps=2,  # 16 of a step's 1024 elements per thread
    )


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    check_attention(q, k_pages, v_pages, page_table)
    check_operand(seq_lens, "seq_lens", q, torch.int32, "[B]", page_table.shape[:1])
    check_operand(page_table, "page_table", q, torch.int32, "[B, M]", (q.shape[0], None))
    out = q.new_empty(q.shape)
    launch_decode_attention(q, k_pages, v_pages, page_table, seq_lens, scale, out)
    return out
