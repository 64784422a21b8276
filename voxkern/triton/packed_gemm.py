"""GEMM with packed weights (formats in voxkern/quantize.py): exact integer products within a group
of 32 columns, groups added in ascending order."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.quantize import BLOCK_ROWS, GROUP, format_of, packed_shape
from voxkern.triton.checks import check, check_operand
from voxkern.triton.language import INTERPRETED, MAX_ELEMENTS, load, rounded, store, tile_size
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
    """Quantize x to int8. One program handles ROWS rows (1, more only under the interpreter) as
    `[ROWS, groups, 32]`.

    With NORM the rows go through the norm first. With SWIGLU a row is `[2C]`, gate first, and goes
    through silu_mul. Both round where those ops store.
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
    # Adding 1.5 * 2^23 leaves no bits for a fraction: rounds to nearest, ties to even.
    whole = tl.where(tl.abs(steps) <= 127.5, steps + 12582912.0 - 12582912.0, 0.0)
    tl.store(values + row * C + column, whole.to(tl.int8), mask=inside)
    # NaN if a value is not finite, because its product with 0 is NaN.
    scale = tl.div_rn(largest, 127.0) + tl.sum(wide * 0.0, 2)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.arange(0, GROUPS)[None, :]
    inside = (row < M) & (group * GROUP < C)
    tl.store(scales + row * (C // GROUP) + group, scale, mask=inside)


@triton.jit(do_not_specialize=["M"])
def packed_gemm_kernel(
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
    """One program handles BLOCK_M rows of x and BLOCKS blocks of 16 weight rows (1, more only under
    the interpreter), STEP groups at a time.

    Weight bytes are loaded in memory order, then permuted to matrices `[32, rows]`. Integer
    products and sums of 32 of them are exact in the float32 of tensor cores.
    """
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK_ROWS) + tl.arange(0, BLOCKS * BLOCK_ROWS)
    r = n % BLOCK_ROWS
    row_block = weight + n // BLOCK_ROWS * block_bytes
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
            inside = (block * BLOCK_ROWS < N) & (byte < groups * 256)
            pairs = tl.load(data + byte, mask=inside, other=0)
            byte_column = tl.arange(0, 16)
            column = (byte_column // 4 * 8 + byte_column % 4)[None, None, :]
            low = as_matrices((pairs & 15).to(tl.int8) - 8, STEP)
            high = as_matrices((pairs >> 4).to(tl.int8) - 8, STEP)
            dots = integer_dot(tl.load(x + column, mask=rows, other=0), low)
            dots += integer_dot(tl.load(x + column + 4, mask=rows, other=0), high)
            code = row_block[None, :] + groups * 256 + g[:, None] * 16 + r[None, :]
            inside = (g[:, None] < groups) & (n[None, :] < N)
            code = tl.load(code, mask=inside, other=0).to(tl.int32)
            scale = (((code & 127) + 1920) << 19).to(tl.float32, bitcast=True)
            scale = tl.where(code > 127, -scale, scale)
        else:
            byte = first * 512 + tl.arange(0, STEP * 512)[None, :]
            inside = (block * BLOCK_ROWS < N) & (byte < groups * 512)
            weights = tl.load(data + byte, mask=inside, other=0)
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
    # Load the row scales byte by byte: a weight may be at any address.
    byte = tl.arange(0, 4)[None, :]
    bits = row_block[:, None] + block_bytes - 64 + r[:, None] * 4 + byte
    bits = tl.load(bits, mask=n[:, None] < N, other=0).to(tl.uint8, bitcast=True)
    bits = tl.sum(bits.to(tl.uint32) << (byte * 8).to(tl.uint32), 1)
    total *= bits.to(tl.uint32).to(tl.float32, bitcast=True)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        total = rounded(total, out) + load(add + m[:, None] * N + n[None, :], inside)
    store(out + m[:, None] * out_stride + n[None, :], total, inside)


@triton.jit
def as_matrices(bytes, STEP: tl.constexpr):
    """Permute bytes `[blocks, ..]`, stored as [STEP, columns / 4, 16, 4] per block, to matrices
    `[STEP, columns, blocks * 16]`."""
    blocks: tl.constexpr = bytes.shape[0]
    columns: tl.constexpr = bytes.shape[1] // (STEP * 16)
    parts = tl.permute(tl.reshape(bytes, (blocks, STEP, columns // 4, 16, 4)), (1, 2, 4, 0, 3))
    return tl.reshape(parts, (STEP, columns, blocks * 16))


@triton.jit
def integer_dot(a, b):
    """Product of int8 matrices on bfloat16 tensor cores; int8 values are exact in bfloat16."""
    return tl.dot(a.to(tl.float32).to(tl.bfloat16), b.to(tl.float32).to(tl.bfloat16))


class Tiles(NamedTuple):
    blocks: int
    block_m: int
    step: int
    num_warps: int
    num_stages: int


def tiles(rows: int, columns: int, blocks: int) -> Tiles:
    """Tile sizes. A program is one warp: its sums over groups need no other, and it keeps three
    times 8 groups of 16 rows in flight, 12 KB in int8, 6 KB in int4."""
    if INTERPRETED.value:
        step = tile_size(columns // GROUP)
        blocks = min(16, tile_size(blocks), max(1, MAX_ELEMENTS // (step * BLOCK_ROWS * GROUP)))
        most = MAX_ELEMENTS // (step * max(GROUP, blocks * BLOCK_ROWS))
        return Tiles(blocks, min(tile_size(rows), most), step, 1, 4)
    return Tiles(1, 16, 8, 1, 4)


def launch_packed_gemm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    add: Tensor | None = None,
) -> None:
    """GEMM with a packed weight of at least N rows: out `[M, N]` from x `[M, C]`, contiguous.

    If given, `norm` is the weight of a norm that x goes through first; with `swiglu`, x is `[M,
    2C]` and goes through silu_mul. If given, `add` `[M, N]` is added to the rounded product.
    """
    rows, columns = len(x), x.shape[1] // (2 if swiglu else 1)
    values = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, columns // GROUP), dtype=torch.float32, device=x.device)
    if columns:
        rows_per_program = 1
        if INTERPRETED.value:
            most = max(1, MAX_ELEMENTS // tile_size(columns, GROUP))
            rows_per_program = min(tile_size(rows), most)
        # Without contraction to fma: one rounding instead of two would differ from the reference.
        quantize_rows_kernel[(triton.cdiv(rows, rows_per_program),)](
            x,
            x if norm is None else norm,
            values,
            scales,
            rows,
            columns,
            eps,
            NORM=norm is not None,
            SWIGLU=swiglu,
            ROWS=rows_per_program,
            GROUPS=tile_size(columns // GROUP),
            GROUP=GROUP,
            num_warps=4,  # 16 elements per thread of CSM's 2048, as in rms_norm
            enable_fp_fusion=False,
        )
    t = tiles(rows, columns, weight.shape[0])
    packed_gemm_kernel[(triton.cdiv(weight.shape[0], t.blocks), triton.cdiv(rows, t.block_m))](
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
    """Check a packed weight whose unpacked shape is `sizes`; N may be None (any)."""
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
