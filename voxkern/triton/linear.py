"""Products with plain weights here, with packed ones in packed_linear.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.quantize import format_of, num_rows
from voxkern.triton.checks import check, check_float, check_operand
from voxkern.triton.language import INTERPRETED, dot, store, tile
from voxkern.triton.packed_linear import check_packed, launch_packed_linear

SPLITS = 4


@triton.jit
def linear_kernel(
    x,
    weight,
    out,
    out_stride,
    M,
    N,
    C,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes BLOCK_M rows of x and BLOCK_N of the weight, `[M, C]` and `[N, C]`.

    Each step reads SPLITS * BLOCK_K neighbouring columns, and a batch of SPLITS products keeps a
    sum of its own of each: one after the other they would take longer than the weight's bytes. So
    the order of an element's sum depends on the two constants and C.
    """
    m = (tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :, None]
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :, None]
    split = tl.arange(0, SPLITS)[:, None, None]
    place = split * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    sums = tl.zeros((SPLITS, BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, C, SPLITS * BLOCK_K):
        column = first + place
        a = tl.load(x + m * C + column, mask=(m < M) & (column < C), other=0.0)
        b = tl.load(weight + n * C + column, mask=(n < N) & (column < C), other=0.0)
        sums = dot(a, tl.permute(b, (0, 2, 1)), sums)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    store(out + m * out_stride + n, tl.sum(sums, 0), (m < M) & (n < N))


class Tiles(NamedTuple):
    block_k: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tiles(rows: int, columns: int, dtype: torch.dtype) -> Tiles:
    """block_k is the same for any number of rows, so that a row's bits are."""
    if INTERPRETED.value:  # few steps: an operation costs a small tile as much as a larger one
        return Tiles(min(2048, tile(triton.cdiv(columns, SPLITS), 16)), 16, 64, 4, 1)
    if dtype == torch.float32:  # multiplied and added one by one, out of registers
        return Tiles(32, 16, 16, 4, 3)
    if rows <= 16:  # the weight's bytes are all: 28 KB of them under way for each program
        return Tiles(32, 16, 16, 4, 8)
    return Tiles(32, 64, 64, 8, 3)


def launch_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out `[M, N]` of x `[M, C]`, contiguous, and a matrix; out's rows may be further apart."""
    if not out.numel():
        return
    if format_of(weight) != "none":
        return launch_packed_linear(x, weight, out)
    rows, columns = x.shape
    t = tiles(rows, columns, x.dtype)
    grid = triton.cdiv(weight.shape[0], t.block_n), triton.cdiv(rows, t.block_m)
    linear_kernel[grid](
        x,
        weight,
        out,
        out.stride(0),
        rows,
        weight.shape[0],
        columns,
        SPLITS=SPLITS,
        BLOCK_K=t.block_k,
        BLOCK_M=t.block_m,
        BLOCK_N=t.block_n,
        num_warps=t.num_warps,
        num_stages=t.num_stages,
    )


def check_matrix(
    weight: Tensor, name: str, like: Tensor, letters: str, sizes: Sequence[int | None]
) -> None:
    """`[..., N, C]` of like's dtype, or packed; N may be None."""
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
