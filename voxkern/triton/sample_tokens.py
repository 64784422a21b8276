import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check, check_dim, check_float, check_operand
from voxkern.triton.language import INTERPRETED, exp, tile_size


@triton.jit(
    do_not_specialize=["B", "W", "codebook"],
    do_not_specialize_on_alignment=["out"],  # may be any column of the codes
)
def sample_tokens_kernel(
    logits,
    logits_stride,
    temperature,
    top_k,
    top_p,
    min_p,
    repetition_penalty,
    history,
    seeds,
    frames,
    out,
    out_stride,
    table,
    embedded,
    B,
    V,
    W,
    C,
    codebook,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program holds all logits of a row (ROWS rows under the interpreter, where an operation on
    more rows costs the same).

    Each filter is a threshold on the logits, found by bisection over the ordered floats: it needs
    no sort, and ties need no special case. Probabilities are scaled to integers, so that the order
    of their sums does not matter. The draw ranks codes by float32 scores, then those near the best
    one by one in float64. With BLOCK_C, the drawn code's row of `table` `[K * V, C]` is copied to
    `embedded` `[B, C]`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < B
    code = tl.arange(0, BLOCK)[None, :]
    pointers = logits + row[:, None] * logits_stride + code
    z = tl.load(pointers, mask=valid[:, None] & (code < V), other=float("-inf")).to(tl.float32)
    z = tl.where(z == z, z, float("inf"))

    if W > 0:
        seen = tl.zeros((ROWS, BLOCK), tl.int1)
        for w in range(0, W):
            seen = seen | (code == tl.load(history + row * W + w, mask=valid, other=-1)[:, None])
        penalty = tl.load(repetition_penalty + row, mask=valid, other=1.0)[:, None]
        quotient = tl.div_rn(z, tl.zeros_like(z) + penalty)
        z = tl.where(seen, tl.where(z > 0, quotient, z * penalty), z)

    broken = tl.abs(tl.max(z, 1)) == float("inf")
    first = tl.min(tl.where(z == tl.max(z, 1)[:, None], code, BLOCK), 1)
    heat = tl.load(temperature + row, mask=valid, other=0.0)
    greedy = (heat > 0) == 0
    z = tl.div_rn(z, tl.zeros_like(z) + tl.where(greedy, 1.0, heat)[:, None])
    largest = tl.max(z, 1)
    # Infinite scores cannot be ranked: the temperature is near 0, or the row is broken.
    greedy = greedy | (tl.abs(largest) == float("inf"))
    largest = tl.where(greedy, 0.0, largest)[:, None]

    order = float_order(z)
    k = tl.load(top_k + row, mask=valid, other=0)
    k = tl.where((k > 0) & (k < V), k, V + 1)
    bound = tl.full((ROWS,), -2139095041, tl.int32)  # float_order(minus infinity)
    if tl.min(k, 0) <= V:
        bound = lowest_kept(order, tl.full((ROWS, BLOCK), 1, tl.uint32), k.to(tl.float64), bound)
    p = tl.load(top_p + row, mask=valid, other=1.0)
    if tl.min(p, 0) < 1:
        odds = exp(tl.minimum(z - largest, 0.0)) * 2147483648.0 + 0.5
        odds = tl.where(order >= bound[:, None], odds, 0.0).to(tl.uint32)
        limit = p.to(tl.float64) * tl.sum(odds.to(tl.int64), 1).to(tl.float64)
        nucleus = lowest_kept(order, odds, limit, bound)
        bound = tl.where(p < 1, nucleus, bound)
    kept = order >= bound[:, None]
    least = tl.load(min_p + row, mask=valid, other=0.0).to(tl.float64)
    if tl.max(least, 0) > 0:
        lowest = tl.log(tl.where(least > 0, tl.minimum(least, 1.0), 1.0))
        likely = z.to(tl.float64) - largest.to(tl.float64) >= lowest[:, None]
        kept = kept & (likely | (least <= 0)[:, None])

    u = uniform(row, valid, seeds, frames, codebook, ROWS, BLOCK)
    score = z - largest - tl.log(-tl.log(u))
    score = tl.where(kept, score, float("-inf"))
    # The best scores lie within 40 of 0, so 1e-3 is far above their rounding errors.
    near = (score >= tl.max(score, 1)[:, None] - 1e-3) & (greedy == 0)[:, None]
    best = tl.full((ROWS,), float("-inf"), tl.float64)
    drawn = tl.zeros((ROWS,), tl.int32)
    while tl.max(near.to(tl.int32)) > 0:
        candidate = tl.min(tl.where(near, code, BLOCK), 1)
        this = near & (code == candidate[:, None])
        near = near & (code != candidate[:, None])
        relative = tl.sum(tl.where(this, z, 0.0), 1).to(tl.float64) - tl.max(largest, 1)
        luck = tl.sum(tl.where(this, u, 0.0), 1) + tl.where(candidate < BLOCK, 0.0, 0.5)
        exact = relative - tl.log(-tl.log(luck.to(tl.float64)))
        better = (exact > best) & (candidate < BLOCK)
        best = tl.where(better, exact, best)
        drawn = tl.where(better, candidate, drawn)
    drawn = tl.where(broken, -1, tl.where(greedy, first, drawn)).to(tl.int64)
    tl.store(out + row * out_stride, drawn, mask=valid)
    if BLOCK_C:
        column = tl.arange(0, BLOCK_C)[None, :]
        inside = valid[:, None] & (column < C)
        offset = (tl.maximum(drawn, 0) + codebook * V)[:, None] * C + column
        values = tl.load(table + offset, mask=inside, other=0.0)
        tl.store(embedded + row[:, None] * C + column, values, mask=inside)


@triton.jit
def float_order(a):
    """Map floats to int32 values in the same order."""
    bits = a.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def lowest_kept(order, weight, limit, low):
    """Bisect for each row's threshold in `order`: the lowest value, at least `low`, above which the
    weights sum to less than `limit`; the row's maximum if there is none."""
    low = low.to(tl.int64)
    high = tl.max(order, 1).to(tl.int64)
    while tl.max(high - low, 0) > 0:
        middle = low + (high - low) // 2
        above = tl.sum(tl.where(order > middle[:, None], weight, 0).to(tl.int64), 1)
        kept = above.to(tl.float64) < limit
        low = tl.where(kept | (low >= high), low, middle + 1)
        high = tl.where(kept, middle, high)
    return low.to(tl.int32)


@triton.jit
def uniform(row, valid, seeds, frames, codebook, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Random numbers `[ROWS, BLOCK]` in (0, 1), exact in float32: word i % 4 of counter i // 4 for
    code i."""
    seed = tl.load(seeds + row, mask=valid, other=0)[:, None]
    frame = tl.load(frames + row, mask=valid, other=0)[:, None]
    counter = tl.zeros((ROWS, BLOCK // 4), tl.uint32)
    a, b, c, d = philox(
        counter + tl.arange(0, BLOCK // 4)[None, :].to(tl.uint32),
        counter + codebook.to(tl.uint32),
        counter + frame.to(tl.uint32),
        counter + (frame >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (words >> 9).to(tl.float32) * 1.1920928955078125e-07 + 5.9604644775390625e-08


@triton.jit
def philox(a, b, c, d, low, high):
    """Philox 4x32-10 (Salmon et al. 2011): four random words from four counter and two key
    words."""
    for _ in tl.static_range(10):
        a_high, a_low = tl.umulhi(a, 0xD2511F53), a * 0xD2511F53
        c_high, c_low = tl.umulhi(c, 0xCD9E8D57), c * 0xCD9E8D57
        a, b, c, d = c_high ^ b ^ low, c_low, a_high ^ d ^ high, a_low
        low += 0x9E3779B9
        high += 0xBB67AE85
    return a, b, c, d


def launch_sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor | None,
    history: Tensor | None,
    seeds: Tensor,
    frames: Tensor,
    codebook: int,
    out: Tensor,
    table: Tensor | None = None,
    embedded: Tensor | None = None,
) -> None:
    """Draw a code per row. Rows of logits, and elements of `out`, may have any stride.

    Without a history there is no penalty. If given, the drawn codes' rows of `table` `[K * V, C]`
    are copied to `embedded` `[B, C]`.
    """
    rows, vocab_size = logits.shape
    if not rows:
        return
    block = tile_size(vocab_size, 4)
    columns = 0 if table is None else table.shape[1]
    rows_per_program = 1
    if INTERPRETED.value:
        rows_per_program = min(tile_size(rows), max(1, 2**18 // block))
    sample_tokens_kernel[(triton.cdiv(rows, rows_per_program),)](
        logits,
        logits.stride(0),
        temperature,
        top_k,
        top_p,
        min_p,
        temperature if history is None else repetition_penalty,
        seeds if history is None else history,
        seeds,
        frames,
        out,
        out.stride(0),
        logits if table is None else table,
        logits if table is None else embedded,
        rows,
        vocab_size,
        0 if history is None else history.shape[1],
        columns,
        codebook,
        ROWS=rows_per_program,
        BLOCK=block,
        BLOCK_C=tile_size(columns) if columns else 0,
        # 16 logits per thread: a bisection is a chain of sums over all logits.
        num_warps=min(8, max(1, block // 512)),
    )


def check_rows(like: Tensor, rows: int, **named: tuple[Tensor, torch.dtype]) -> None:
    """Check operands `[B]`, by name."""
    for name, (t, dtype) in named.items():
        check_operand(t, name, like, dtype, "[B]", (rows,))


def check_sampling(
    like: Tensor,
    rows: int,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    frames: Tensor,
) -> None:
    """Check the sampling arguments, which are the same for every op that draws."""
    check_rows(
        like,
        rows,
        temperature=(temperature, torch.float32),
        top_k=(top_k, torch.int32),
        top_p=(top_p, torch.float32),
        min_p=(min_p, torch.float32),
        seeds=(seeds, torch.int64),
        frames=(frames, torch.int64),
    )


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    history: Tensor,
    seeds: Tensor,
    frames: Tensor,
    codebook: int,
) -> Tensor:
    check_float(logits, "logits")
    check_dim(logits, "logits", 2)
    rows, vocab_size = logits.shape
    fits = 1 <= vocab_size < 1 << 20
    check(fits, f"logits: expected [B, V] with 1 <= V < 2^20, got {list(logits.shape)}")
    check_sampling(logits, rows, temperature, top_k, top_p, min_p, seeds, frames)
    check_rows(logits, rows, repetition_penalty=(repetition_penalty, torch.float32))
    check_operand(history, "history", logits, torch.int64, "[B, W]", (rows, None))
    out = logits.new_empty((rows,), dtype=torch.int64)
    launch_sample_tokens(
        logits.contiguous(),
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        history,
        seeds,
        frames,
        codebook,
        out,
    )
    return out
