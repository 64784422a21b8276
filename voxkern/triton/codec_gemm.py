"""The codec's GEMM `rows @ weight.T`, with fused prologues (windows over blocks of samples, ELU,
norm) and epilogues (bias, activation, residual)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.quantize import BLOCK_ROWS
from voxkern.triton.checks import check
from voxkern.triton.language import INTERPRETED, dot, exp, load, tile_size


@triton.jit(do_not_specialize=["M", "T"])
def codec_gemm_kernel(
    x,
    past,
    norm,
    weight,
    bias,
    add,
    out,
    M,
    N,
    K: tl.constexpr,
    T,
    C: tl.constexpr,
    context,
    dilation,
    eps,
    ELU: tl.constexpr,
    BLOCKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program handles BLOCK_M rows of x and BLOCK_N rows of the weight. Each step covers SPLITS
    ranges of BLOCK_K columns, each with its own product and accumulator, so that none is a long
    chain.

    Rows and sums are float32; for a bfloat16 weight, rows are rounded to bfloat16 before the
    product. past, norm (`[2, K]`), bias and add may be None.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row, out_row = m.to(tl.int64) * C, m.to(tl.int64) * N
    weight_row = n.to(tl.int64) * K
    if norm is not None:
        columns = tl.arange(0, triton.next_power_of_2(K))[None, :]
        whole = load(x + x_row[:, None] + columns, (m < M)[:, None] & (columns < K))
        mean = tl.sum(whole, 1) / K
        centred = tl.where(columns < K, whole - mean[:, None], 0.0)
        factor = tl.rsqrt(tl.sum(centred * centred, 1) / K + eps)

    offset = (tl.arange(0, SPLITS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])[:, None, :]
    row, t = m[None, :, None], (m % T)[None, :, None]
    first_of_past = ((m // T).to(tl.int64) * context * C)[None, :, None]
    sums = tl.zeros((SPLITS, BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, SPLITS * BLOCK_K):
        column = first + offset
        source = x + x_row[None, :, None] + column
        if past is not None:
            # The row's window begins `context` blocks before its own block, possibly in the past.
            block = column // C * dilation
            from_x = x + x_row[None, :, None] + (block - context) * C
            from_past = past + first_of_past + (t + block) * C
            source = tl.where(t + block >= context, from_x, from_past) + column % C
        a = load(source, (row < M) & (column < K))
        if ELU:
            a = tl.where(a > 0, a, tl.exp(a) - 1.0)
        if norm is not None:
            a = (a - mean[None, :, None]) * factor[None, :, None]
            a = a * load(norm + column, column < K) + load(norm + K + column, column < K)
        if BLOCKED:
            b = load_blocks(weight, first, K, SPLITS, BLOCK_K)
        else:
            pointers = weight + weight_row[None, :, None] + column
            b = tl.load(pointers, mask=(n[None, :, None] < N) & (column < K), other=0.0)
            b = tl.permute(b, (0, 2, 1))
        sums = dot(a.to(weight.dtype.element_ty), b, sums)

    total = tl.sum(sums, 0)
    if bias is not None:
        total += load(bias + n, n < N)[None, :]
    if ACTIVATION is not None:
        total = activate(total, ACTIVATION)
    offset = out_row[:, None] + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if add is not None:
        total += load(add + offset, inside)
    tl.store(out + offset, total, mask=inside)


@triton.jit
def load_blocks(weight, first, K, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load `[SPLITS, BLOCK_K, 16]` of the program's block of a `block_rows` weight in memory order:
    column by column of 16 rows each, in bfloat16 two columns interleaved."""
    pair: tl.constexpr = 2 if weight.dtype.element_ty == tl.bfloat16 else 1
    element = tl.arange(0, SPLITS)[:, None] * (16 * BLOCK_K) + tl.arange(0, 16 * BLOCK_K)[None, :]
    offset = tl.program_id(1).to(tl.int64) * 16 * K + first * 16 + element
    values = tl.load(weight + offset, mask=first * 16 + element < 16 * K, other=0.0)
    values = tl.reshape(values, (SPLITS, BLOCK_K // pair, 16, pair))
    return tl.reshape(tl.permute(values, (0, 1, 3, 2)), (SPLITS, BLOCK_K, 16))


@triton.jit
def activate(x, NAME: tl.constexpr):
    if NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "silu":
        return x * sigmoid(x)
    else:
        return tl.where(x < 0, 0.0, x)


@triton.jit
def sigmoid(x):
    """Computed from e^-|x|, which cannot overflow."""
    e = exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


class Tiles(NamedTuple):
    splits: int
    block_k: int
    block_m: int


def tiles(columns: int) -> Tiles:
    """Tile sizes from the weight's columns alone, so that a row runs the same code, and gets the
    same bits, alone and in a batch. Each split is one warp with at least two steps."""
    if INTERPRETED.value:  # an operation on a small tile costs as much as on a large one
        block_k = min(2048, tile_size(columns, 16))
        return Tiles(1, block_k, max(32, min(256, (1 << 14) // block_k)))
    splits = 1
    while splits < 8 and columns >= 128 * splits:
        splits *= 2
    return Tiles(splits, 32, 16)


def launch_codec_gemm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    past: Tensor | None = None,
    dilation: int = 1,
    elu: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    activation: str | None = None,
    add: Tensor | None = None,
) -> None:
    """`out = activation(rows @ weight.T + bias) + add`, all contiguous.

    Args:
        x: `[B, T, C]`, the rows; with a past, blocks whose windows are the rows, as in `mimi_conv`.
        weight: `[N, K]`, or the `block_rows` of it.
        out: `[B, T, N]`; may be `add`.
        past, dilation, elu: as in `mimi_conv`; the past is only read.
        norm, eps: `[2, C]`, scale and bias of a LayerNorm of the rows, and its eps.
        add: `[B, T, N]`.
    """
    steps, width = x.shape[1:]
    context = 0 if past is None else past.shape[1]
    blocked = weight.dim() > 2
    rows, columns, outputs = out.shape[0] * steps, (context // dilation + 1) * width, out.shape[2]
    check(rows < 2**31, f"x: on CUDA expected B T below 2^31, got shape {list(x.shape)}")
    if not out.numel():
        return
    t = tiles(columns)
    block_n = 64 if INTERPRETED.value and not blocked else BLOCK_ROWS
    codec_gemm_kernel[(triton.cdiv(rows, t.block_m), triton.cdiv(outputs, block_n))](
        x,
        past if context else None,
        norm,
        weight,
        bias,
        add,
        out,
        rows,
        outputs,
        columns,
        steps,
        width,
        context,
        dilation,
        eps,
        ELU=elu,
        BLOCKED=blocked,
        ACTIVATION=activation,
        SPLITS=t.splits,
        BLOCK_K=t.block_k,
        BLOCK_M=t.block_m,
        BLOCK_N=block_n,
        num_warps=t.splits,
        # A stage takes 32 KB in float32, 24 KB in bfloat16; AMD's GPUs have 64 KB.
        num_stages=3 if weight.dtype == torch.bfloat16 else 2,
    )
