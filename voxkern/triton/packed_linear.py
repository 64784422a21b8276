"""Products with packed weights (voxkern/quantize.py has the formats): exact integers within a group
of 32 columns, groups added in ascending order."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.quantize import BLOCK_ROWS, GROUP, format_of, packed_shape
from voxkern.triton.checks import check, check_operand
from voxkern.triton.language import INTERPRETED, MOST_ELEMENTS, load, rounded, store, tile
from voxkern.triton.rms_norm import rms_scale
from voxkern.triton.silu_mul import silu


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x,
    norm,
    values,
    scales,
    M,
    C,
    eps,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program takes ROWS rows of x (1, but when interpreted): `[ROWS, groups, 32]`.

    With NORM they go through the norm first, with SWIGLU they are `[2C]`, gate first; rounded as
    those ops store.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    group = tl.arange(0, GROUPS)[None, :, None]
    column = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    inside = (row < M) & (column < C)
    if SWIGLU:
        gate = load(x + row * 2 * C + column, inside)
        wide = rounded(silu(gate) * load(x + row * 2 * C + C + column, inside), x)
    else:
        wide = load(x + row * C + column, inside)
    if NORM:
        scale = rms_scale(tl.reshape(wide, (ROWS, GROUPS * GROUP)), C, eps)
        wide = rounded(wide * scale[:, None, None] * load(norm + column, column < C), x)
    largest = tl.max(tl.abs(wide), 2)
    inverse = tl.where(largest >= 1e-30, tl.div_rn(127.0, largest), 0.0)
    steps = wide * inverse[:, :, None]
    # Adding 1.5 * 2^23 leaves no place for fractions: to nearest, ties to even.
    whole = tl.where(tl.abs(steps) <= 127.5, steps + 12582912.0 - 12582912.0, 0.0)
    tl.store(values + row * C + column, whole.to(tl.int8), mask=inside)
    # Not a number if a value is not finite: so is its product with 0.
    scale = tl.div_rn(largest, 127.0) + tl.sum(wide * 0.0, 2)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.arange(0, GROUPS)[None, :]
    inside = (row < M) & (group * GROUP < C)
    tl.store(scales + row * (C // GROUP) + group, scale, mask=inside)


@triton.jit(do_not_specialize=["M"])
def packed_linear_kernel(
    values,
    scales,
    weight,
    add,
    out,
    out_stride,
    M,
    N,
    groups,
    block_bytes,
    INT4: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program takes BLOCK_M rows of x and BLOCKS blocks of 16 of the weight (1, but when
    interpreted), STEP groups at a time.

    Their bytes are read in the order in which they lie, then turned to matrices `[32, rows]`.
    Products of integers, and sums of 32 of them, are exact in tensor cores' float32.
    """
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK_ROWS) + tl.arange(0, BLOCKS * BLOCK_ROWS)
    r = n % BLOCK_ROWS
    mine = weight + n // BLOCK_ROWS * block_bytes
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    data = weight + block * block_bytes
    u = tl.arange(0, STEP)
    total = tl.zeros((BLOCK_M, BLOCKS * BLOCK_ROWS), tl.float32)
    for first in range(0, groups, STEP):
        g = first + u
        rows = (m[None, :, None] < M) & (g[:, None, None] < groups)
        x = values + (m[None, :, None] * groups + g[:, None, None]) * 32
        if INT4:
            byte = first * 256 + tl.arange(0, STEP * 256)[None, :]
            there = (block * BLOCK_ROWS < N) & (byte < groups * 256)
            pairs = tl.load(data + byte, mask=there, other=0)
            place = tl.arange(0, 16)
            column = (place // 4 * 8 + place % 4)[None, None, :]
            low = as_matrices((pairs & 15).to(tl.int8) - 8, STEP)
            high = as_matrices((pairs >> 4).to(tl.int8) - 8, STEP)
            dots = integer_dot(tl.load(x + column, mask=rows, other=0), low)
            dots += integer_dot(tl.load(x + column + 4, mask=rows, other=0), high)
            code = mine[None, :] + groups * 256 + g[:, None] * 16 + r[None, :]
            there = (g[:, None] < groups) & (n[None, :] < N)
            code = tl.load(code, mask=there, other=0).to(tl.int32)
            scale = (((code & 127) + 1920) << 19).to(tl.float32, bitcast=True)
            scale = tl.where(code > 127, -scale, scale)
        else:
            byte = first * 512 + tl.arange(0, STEP * 512)[None, :]
            there = (block * BLOCK_ROWS < N) & (byte < groups * 512)
            weights = tl.load(data + byte, mask=there, other=0)
            column = tl.arange(0, 32)[None, None, :]
            matrices = as_matrices(weights, STEP)
            dots = integer_dot(tl.load(x + column, mask=rows, other=0), matrices)
            scale = tl.full((STEP, BLOCKS * BLOCK_ROWS), 1.0, tl.float32)
        x_scale = scales + m[None, :] * groups + g[:, None]
        rows = (m[None, :] < M) & (g[:, None] < groups)
        x_scale = tl.load(x_scale, mask=rows, other=0.0)
        terms = dots * (scale[:, None, :] * x_scale[:, :, None])
        for i in tl.static_range(STEP):
            total += tl.sum(tl.where(u[:, None, None] == i, terms, 0.0), 0)
    # The rows' scales, byte by byte: a weight may lie at any address.
    byte = tl.arange(0, 4)[None, :]
    bits = mine[:, None] + block_bytes - 64 + r[:, None] * 4 + byte
    bits = tl.load(bits, mask=n[:, None] < N, other=0).to(tl.uint8, bitcast=True)
    bits = tl.sum(bits.to(tl.uint32) << (byte * 8).to(tl.uint32), 1)
    total *= bits.to(tl.uint32).to(tl.float32, bitcast=True)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        total = rounded(total, out) + load(add + m[:, None] * N + n[None, :], inside)
    store(out + m[:, None] * out_stride + n[None, :], total, inside)


@triton.jit
def as_matrices(bytes, STEP: tl.constexpr):
    """`[STEP, columns, blocks * 16]` of `[blocks, ..]` in the order [STEP, columns / 4, 16, 4]."""
    blocks: tl.constexpr = bytes.shape[0]
    columns: tl.constexpr = bytes.shape[1] // (STEP * 16)
    parts = tl.permute(tl.reshape(bytes, (blocks, STEP, columns // 4, 16, 4)), (1, 2, 4, 0, 3))
    return tl.reshape(parts, (STEP, columns, blocks * 16))


@triton.jit
def integer_dot(a, b):
    return tl.dot(a.to(tl.float32).to(tl.bfloat16), b.to(tl.float32).to(tl.bfloat16))


class Tiles(NamedTuple):
    blocks: int
    block_m: int
    step: int
    num_warps: int
    num_stages: int


def tiles(rows: int, columns: int, blocks: int) -> Tiles:
    """A program is a warp: its sums over groups need no other, and its bytes under way, three times
    8 groups of 16 rows, are 12 KB in int8, 6 KB in int4."""
    if INTERPRETED.value:
        step = tile(columns // GROUP)
        blocks = min(16, tile(blocks), max(1, MOST_ELEMENTS // (step * BLOCK_ROWS * GROUP)))
        most = MOST_ELEMENTS // (step * max(GROUP, blocks * BLOCK_ROWS))
        return Tiles(blocks, min(tile(rows), most), step, 1, 4)
    return Tiles(1, 16, 8, 1, 4)


def launch_packed_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    add: Tensor | None = None,
) -> None:
    """out `[M, N]` of x `[M, C]`, contiguous, and a packed matrix of at least N rows.

    x goes through a norm of that weight first, if there is one, or, `[M, 2C]`, through silu_mul.
    The rounded product is added to `add` `[M, N]`, if there is one.
    """
    rows, columns = len(x), x.shape[1] // (2 if swiglu else 1)
    values = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, columns // GROUP), dtype=torch.float32, device=x.device)
    if columns:
        at_once = 1
        if INTERPRETED.value:
            at_once = min(tile(rows), max(1, MOST_ELEMENTS // tile(columns, GROUP)))
        # A contraction of a product and a sum to one rounding would not be the reference's.
        quantize_rows_kernel[(triton.cdiv(rows, at_once),)](
            x,
            x if norm is None else norm,
            values,
            scales,
            rows,
            columns,
            eps,
            NORM=norm is not None,
            SWIGLU=swiglu,
            ROWS=at_once,
            GROUPS=tile(columns // GROUP),
            GROUP=GROUP,
            num_warps=4,  # 16 elements a thread of CSM's 2048, as in rms_norm
            enable_fp_fusion=False,
        )
    t = tiles(rows, columns, weight.shape[0])
    packed_linear_kernel[(triton.cdiv(weight.shape[0], t.blocks), triton.cdiv(rows, t.block_m))](
        values,
        scales,
        weight,
        x if add is None else add,
        out,
        out.stride(0),
        rows,
        out.shape[1],
        columns // GROUP,
        weight.shape[1],
        INT4=format_of(weight) == "int4",
        ADD=add is not None,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCKS=t.blocks,
        BLOCK_M=t.block_m,
        STEP=t.step,
        num_warps=t.num_warps,
        num_stages=t.num_stages,
        enable_fp_fusion=False,
    )


def check_packed(
    weight: Tensor, name: str, like: Tensor, letters: str, sizes: Sequence[int | None]
) -> None:
    """A packed weight whose plain shape is `sizes`, of which N may be None."""
    columns = sizes[-1]
    check_operand(weight, name, like, weight.dtype)
    check(
        columns % GROUP == 0,
        f"{name}: packed, which needs columns in a multiple of {GROUP}, got {columns}",
    )
    blocks, block_bytes = packed_shape((sizes[-2] or 0, columns), format_of(weight))
    packed = (*sizes[:-2], None if sizes[-2] is None else blocks, block_bytes)
    check(
        weight.dim() == len(packed),
        f"{name}: expected {len(packed)} dimensions, got shape {list(weight.shape)}",
    )
    check_operand(weight, name, like, weight.dtype, f"{letters} packed", packed)
