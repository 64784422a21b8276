import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check_attention, check_operand
from voxkern.triton.language import INTERPRETED, dot, load, store, tile_size


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
    and it writes the result to `out`. Float32 throughout.
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
    k = load(k_pages + offset[:, None] + column[None, :], mask)
    v = load(v_pages + offset[:, None] + column[None, :], mask)

    g = tl.arange(0, BLOCK_G)
    rows = (g < GROUP)[:, None] & (column < D)[None, :]
    queries = load(q + b * q_stride + (h * GROUP + g)[:, None] * D + column[None, :], rows)
    scores = dot(queries * scale, tl.trans(k), tl.zeros((BLOCK_G, SPLIT), tl.float32))
    scores = tl.where(inside[None, :], scores, float("-inf"))
    largest = tl.where(length > 0, tl.max(scores, 1), 0.0)
    weights = tl.exp(scores - largest[:, None])
    total = dot(weights, v, tl.zeros((BLOCK_G, BLOCK_D), tl.float32))

    row = (b * Hkv + h) * GROUP + g
    if SINGLE_SPLIT:
        total = tl.where(length > 0, total / tl.sum(weights, 1)[:, None], 0.0)
        store(out + row[:, None] * D + column[None, :], total, rows)
        return
    row = row * splits + split
    tl.store(sums + row[:, None] * D + column[None, :], total, mask=rows)
    tl.store(states + row * 2, largest, mask=g < GROUP)
    tl.store(states + row * 2 + 1, tl.sum(weights, 1), mask=g < GROUP)


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
    """Combine the splits. One program handles HEADS query heads of a sequence (1, more only under
    the interpreter), SPLITS_PER_STEP splits at a time."""
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
        split = first + tl.arange(0, SPLITS_PER_STEP)
        index = row[:, None] * splits + split[None, :]
        mask = (head < Hq)[:, None] & (split < used)[None, :]
        maxima = tl.load(states + index * 2, mask=mask, other=float("-inf"))
        weights = tl.load(states + index * 2 + 1, mask=mask, other=0.0)
        inside = mask[:, :, None] & (column < D)[None, None, :]
        parts = tl.load(
            sums + index[:, :, None] * D + column[None, None, :], mask=inside, other=0.0
        )
        new = tl.maximum(largest, tl.max(maxima, 1))
        factors = tl.exp(maxima - new[:, None])
        total = total * tl.exp(largest - new)[:, None] + tl.sum(parts * factors[:, :, None], 1)
        weight = weight * tl.exp(largest - new) + tl.sum(weights * factors, 1)
        largest = new
    total = total / tl.where(length > 0, weight, 1.0)[:, None]
    inside = (head < Hq)[:, None] & (column < D)[None, :]
    store(out + row[:, None] * D + column[None, :], total, inside)


def split_keys(head_dim: int) -> int:
    """Keys per program: 16 KB of keys and 16 KB of values in float32, so that several programs fit
    on a multiprocessor. It depends on the head width alone, so that neither the batch nor the page
    table changes a result."""
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
            BLOCK_G=tile_size(heads // kv_heads),
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
        SPLITS_PER_STEP=16,  # CSM's longest sequence has 32 splits
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
