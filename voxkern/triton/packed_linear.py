"""Products with packed weights (voxkern/quantize.py has the formats): exact integers within a group
of 32 columns, groups added in ascending order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.quantize import BLOCK_ROWS, GROUP, format_of, packed_shape
from voxkern.triton.checks import check, check_operand
from voxkern.triton.language import INTERPRETED, load, store, tile


@triton.jit
def quantize_rows_kernel(x, values, scales, C, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """A program takes a row of x: `[groups, 32]`."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < C
    wide = load(x + row * C + column, inside)
    largest = tl.max(tl.abs(wide), 1)
    inverse = tl.where(largest >= 1e-30, tl.div_rn(127.0, largest), 0.0)
    steps = wide * inverse[:, None]
    # Adding 1.5 * 2^23 leaves no place for fractions: to nearest, ties to even.
    whole = tl.where(tl.abs(steps) <= 127.5, steps + 12582912.0 - 12582912.0, 0.0)
    tl.store(values + row * C + column, whole.to(tl.int8), mask=inside)
    # Not a number if a value is not finite: so is its product with 0.
    scale = tl.div_rn(largest, 127.0) + tl.sum(wide * 0.0, 1)
    tl.store(scales + row * (C // GROUP) + group, scale, mask=group * GROUP < C)


@triton.jit
def packed_linear_kernel(
    values,
    scales,
    weight,
    out,
    out_stride,
    M,
    N,
    groups,
    block_bytes,
    INT4: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program takes BLOCK_M rows of x and a block of 16 of the weight, STEP groups at a time.

    Their bytes are read in the order in which they lie, then turned to matrices `[32, 16]`.
    Products of integers, and sums of 32 of them, are exact in tensor cores' float32.
    """
    block = tl.program_id(0).to(tl.int64)
    data = weight + block * block_bytes
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_ROWS)
    u = tl.arange(0, STEP)
    total = tl.zeros((BLOCK_M, BLOCK_ROWS), tl.float32)
    for first in range(0, groups, STEP):
        g = first + u
        rows = (m[None, :, None] < M) & (g[:, None, None] < groups)
        x = values + (m[None, :, None] * groups + g[:, None, None]) * 32
        if INT4:
            byte = tl.arange(0, STEP * 256)
            pairs = tl.load(data + first * 256 + byte, mask=first + byte // 256 < groups, other=0)
            place = tl.arange(0, 16)
            column = (place // 4 * 8 + place % 4)[None, None, :]
            low = as_matrices((pairs & 15).to(tl.int8) - 8, STEP)
            high = as_matrices((pairs >> 4).to(tl.int8) - 8, STEP)
            dots = integer_dot(tl.load(x + column, mask=rows, other=0), low)
            dots += integer_dot(tl.load(x + column + 4, mask=rows, other=0), high)
            code = data + groups * 256 + g[:, None] * 16 + r[None, :]
            code = tl.load(code, mask=g[:, None] < groups, other=0).to(tl.int32)
            scale = (((code & 127) + 1920) << 19).to(tl.float32, bitcast=True)
            scale = tl.where(code > 127, -scale, scale)
        else:
            byte = tl.arange(0, STEP * 512)
            weights = data + first * 512 + byte
            weights = tl.load(weights, mask=first + byte // 512 < groups, other=0)
            column = tl.arange(0, 32)[None, None, :]
            matrices = as_matrices(weights, STEP)
            dots = integer_dot(tl.load(x + column, mask=rows, other=0), matrices)
            scale = tl.full((STEP, BLOCK_ROWS), 1.0, tl.float32)
        x_scale = scales + m[None, :] * groups + g[:, None]
        rows = (m[None, :] < M) & (g[:, None] < groups)
        x_scale = tl.load(x_scale, mask=rows, other=0.0)
        terms = dots * (scale[:, None, :] * x_scale[:, :, None])
        for i in tl.static_range(STEP):
            total += tl.sum(tl.where(u[:, None, None] == i, terms, 0.0), 0)
    # The rows' scales, byte by byte: a weight may lie at any address.
    byte = tl.arange(0, 4)[None, :]
    bits = tl.load(data + block_bytes - 64 + r[:, None] * 4 + byte).to(tl.uint8, bitcast=True)
    bits = tl.sum(bits.to(tl.uint32) << (byte * 8).to(tl.uint32), 1)
    total *= bits.to(tl.uint32).to(tl.float32, bitcast=True)[None, :]
    n = block * BLOCK_ROWS + r
    store(out + m[:, None] * out_stride + n[None, :], total, (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def as_matrices(flat, STEP: tl.constexpr):
    """`[STEP, columns, 16]` of bytes in the order [STEP, columns / 4, 16 rows, 4]."""
    columns: tl.constexpr = flat.numel // (STEP * 16)
    blocks = tl.reshape(flat, (STEP, columns // 4, 16, 4))
    return tl.reshape(tl.permute(blocks, (0, 1, 3, 2)), (STEP, columns, 16))


@triton.jit
def integer_dot(a, b):
    return tl.dot(a.to(tl.float32).to(tl.bfloat16), b.to(tl.float32).to(tl.bfloat16))


def launch_packed_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out `[M, N]` of x `[M, C]`, contiguous, and a packed matrix of at least N rows."""
    rows, columns = x.shape
    values = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, columns // GROUP), dtype=torch.float32, device=x.device)
    if columns:
        # A contraction of a product and a sum to one rounding would not be the reference's.
        quantize_rows_kernel[(rows,)](
            x,
            values,
            scales,
            columns,
            GROUPS=tile(columns // GROUP),
            GROUP=GROUP,
            num_warps=4,
            enable_fp_fusion=False,
        )
    # A program is a warp: its sums over groups need no other, and its bytes under way, three times
    # 8 groups of 16 rows, are 12 KB in int8, 6 KB in int4.
    block_m, step = (32, tile(columns // GROUP)) if INTERPRETED.value else (16, 8)
    packed_linear_kernel[(weight.shape[0], triton.cdiv(rows, block_m))](
        values,
        scales,
        weight,
        out,
        out.stride(0),
        rows,
        out.shape[1],
        columns // GROUP,
        weight.shape[1],
        INT4=format_of(weight) == "int4",
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_M=block_m,
        STEP=step,
        num_warps=1,
        num_stages=4,
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
