"""`linear`, and the GEMM with plain weights; packed_gemm.py has the one with packed weights."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.quantize import format_of, num_rows
from voxkern.triton.checks import check, check_float, check_operand
from voxkern.triton.language import INTERPRETED, MAX_ELEMENTS, dot, load, rounded, store, tile_size
from voxkern.triton.packed_gemm import check_packed, launch_packed_gemm
from voxkern.triton.rms_norm import launch_rms_norm, rms_scale
from voxkern.triton.silu_mul import silu

SPLITS = 4
MAX_FUSED_ROWS = 16
"""Rows that fit in one tile: up to here a launch can fuse a prologue (norm) and SwiGLU."""


@triton.jit(do_not_specialize=["M"])
def dense_gemm_kernel(
    x,
    norm,
    weight,
    add,
    out,
    out_stride,
    M,
    N,
    C,
    eps,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    SWIGLU: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program handles BLOCK_M rows of x `[M, C]` and BLOCK_N rows of the weight `[N, C]`.

    Each step reads SPLITS * BLOCK_K neighbouring columns as a batch of SPLITS products, each with
    its own accumulator: one chain of products would take longer than loading the weight. So the
    order of an element's sum depends on SPLITS, BLOCK_K and C alone.

    NORM is a prologue: x goes through the norm first, and each program computes the row scales
    itself. ADD is an epilogue: the result is added to `add` `[M, N]`. With SWIGLU the weight is
    `[2N, C]`, gate rows first, and a program handles BLOCK_N rows of either half. Values are
    rounded where the ops that are fused would store them.
    """
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :, None]
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    split = tl.arange(0, SPLITS)[:, None, None]
    offset = split * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    if NORM:
        scales = rms_scales(x, M, C, eps, BLOCK_M, NORM_ROWS, BLOCK_C)[None, :, None]
    sums = tl.zeros((SPLITS, BLOCK_M, BLOCK_N), tl.float32)
    if SWIGLU:
        ups = tl.zeros((SPLITS, BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, C, UNROLL * SPLITS * BLOCK_K):
        for step in tl.static_range(UNROLL):
            column = first + step * SPLITS * BLOCK_K + offset
            inside = (m < M) & (column < C)
            a = tl.load(x + m.to(tl.int64) * C + column, mask=inside, other=0.0)
            # Load the norm's weight for each row again: the loads are then pipelined and laid out
            # like those of x.
            if NORM:
                factors = load(norm + m.to(tl.int64) * 0 + column, inside)
                a = (a.to(tl.float32) * scales * factors).to(x.dtype.element_ty)
            inside = (n < N) & (column < C)
            b = tl.load(weight + n * C + column, mask=inside, other=0.0)
            sums = dot(a, tl.permute(b, (0, 2, 1)), sums)
            if SWIGLU:
                b = tl.load(weight + (N + n) * C + column, mask=inside, other=0.0)
                ups = dot(a, tl.permute(b, (0, 2, 1)), ups)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (m < M) & (n < N)
    result = sum_splits(sums)
    if SWIGLU:
        result = silu(rounded(result, out)) * rounded(sum_splits(ups), out)
    if ADD:
        result = rounded(result, out) + load(add + m * N + n, inside)
    store(out + m * out_stride + n, result, inside)


@triton.jit
def rms_scales(x, M, C, eps, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Scales `[BLOCK_M]` of the first rows of x, computed ROWS rows at a time."""
    m = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_C)[None, :]
    scales = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, M, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (column < C)
        scale = rms_scale(load(x + row[:, None].to(tl.int64) * C + column, inside), C, eps)
        scales += tl.sum(tl.where(m[:, None] == row[None, :], scale[None, :], 0.0), 1)
    return scales


@triton.jit
def sum_splits(sums):
    """Sum `[SPLITS, BLOCK_M, BLOCK_N]` over the splits, in an order that no layout changes."""
    rows: tl.constexpr = sums.shape[1]
    columns: tl.constexpr = sums.shape[2]
    for _ in tl.static_range(2):
        sums = tl.sum(tl.reshape(sums, (2, sums.shape[0] // 2, rows, columns)), 0)
    return tl.reshape(sums, (rows, columns))


class Tiles(NamedTuple):
    block_k: int
    block_m: int
    block_n: int
    unroll: int
    norm_rows: int
    num_warps: int
    num_stages: int


def tiles(rows: int, columns: int, dtype: torch.dtype, norm: bool, swiglu: bool) -> Tiles:
    """Tile sizes. block_k does not depend on `rows`, so neither do the bits of a row."""
    if INTERPRETED.value:  # few steps: an operation on a small tile costs as much as on a large one
        block_k = min(2048, tile_size(triton.cdiv(columns, SPLITS), 16))
        return Tiles(block_k, 16, min(256, MAX_ELEMENTS // (SPLITS * block_k)), 1, 16, 4, 1)
    # At most 64 registers per thread: more would not be free before the GEMM starts.
    norm_rows = max(1, min(4, tile_size(rows), 8192 // tile_size(columns)))
    if dtype == torch.float32:  # plain multiply-adds, from registers
        return Tiles(32, 16, 16, 1, norm_rows, 4, 3)
    if rows > 64:  # a warp per split: more would repeat the same work; two programs fit
        return Tiles(32, 64, 64, 1, norm_rows, 4, 3)
    if rows > MAX_FUSED_ROWS:  # one tile of rows, bound by weight bytes: 60 KB, three programs fit
        return Tiles(32, 64, 16, 1, norm_rows, 4, 4)
    if swiglu:  # 48 KB: all of CSM's 512 programs run at once, four per multiprocessor
        return Tiles(32, 16, 16, 1, norm_rows, 4, 4)
    if norm:  # 60 KB with x and the norm's weight, near gfx942's limit of 64
        return Tiles(32, 16, 16, 1, norm_rows, 4, 6)
    # Bound by weight bytes alone. One or two programs per multiprocessor each keep 32 KB in flight,
    # with one barrier per 8 KB.
    return Tiles(32, 16, 16, 2, norm_rows, 4, 5)


def launch_dense_gemm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    add: Tensor | None = None,
    swiglu: bool = False,
) -> None:
    """GEMM with a plain weight: out `[M, N]` from x `[M, C]`; out may have any row stride.

    A norm or SwiGLU needs at most MAX_FUSED_ROWS rows of x.
    """
    if not out.numel():
        return
    rows, columns = x.shape
    t = tiles(rows, columns, x.dtype, norm is not None, swiglu)
    grid = triton.cdiv(out.shape[1], t.block_n), triton.cdiv(rows, t.block_m)
    dense_gemm_kernel[grid](
        x,
        x if norm is None else norm,
        weight,
        x if add is None else add,
        out,
        out.stride(0),
        rows,
        out.shape[1],
        columns,
        eps,
        NORM=norm is not None,
        ADD=add is not None,
        SWIGLU=swiglu,
        SPLITS=SPLITS,
        NORM_ROWS=0 if norm is None else t.norm_rows,
        BLOCK_C=0 if norm is None else tile_size(columns),
        BLOCK_K=t.block_k,
        BLOCK_M=t.block_m,
        BLOCK_N=t.block_n,
        UNROLL=t.unroll,
        num_warps=t.num_warps,
        num_stages=t.num_stages,
    )


def launch_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    add: Tensor | None = None,
) -> None:
    """GEMM with a plain or packed weight: out `[M, N]` from x `[M, C]`.

    All are contiguous, except that out may have any row stride. If given, `norm` is the weight of a
    norm that x goes through first, and the rounded product is added to `add` `[M, N]`.
    """
    if not out.numel():
        return
    if format_of(weight) != "none":
        return launch_packed_gemm(x, weight, out, norm=norm, eps=eps, add=add)
    if norm is not None and len(x) > MAX_FUSED_ROWS:
        normed = torch.empty_like(x)
        launch_rms_norm(x, None, norm, eps, normed)
        x, norm = normed, None
    launch_dense_gemm(x, weight, out, norm, eps, add)


def check_matrix(
    weight: Tensor, name: str, like: Tensor, letters: str, sizes: Sequence[int | None]
) -> None:
    """Check a matrix `[..., N, C]`, packed or of the dtype of `like`; N may be None (any)."""
    if format_of(weight) == "none":
        check_operand(weight, name, like, like.dtype, letters, sizes)
    else:
        check_packed(weight, name, like, letters, sizes)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    check_float(x, "x")
    check(x.dim() >= 1, "x: expected [..., C], got a scalar")
    check_matrix(weight, "weight", x, "[N, C]", (None, x.shape[-1]))
    out = x.new_empty((*x.shape[:-1], num_rows(weight)))
    rows = out.shape[:-1].numel()
    launch_linear(x.reshape(rows, x.shape[-1]).contiguous(), weight, out.view(rows, out.shape[-1]))
    return out
