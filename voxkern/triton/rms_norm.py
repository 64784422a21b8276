import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check_float, check_operand
from voxkern.triton.language import INTERPRETED, load, rounded, store, sum_in_pairs, tile


@triton.jit(do_not_specialize=["M"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    M,
    C,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes ROWS rows of M, all of them in registers: 1, but when interpreted.

    With ADD the sum with the residual is rounded before it is squared, as it is stored. The result
    is rounded once.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = row * C + column
    inside = (row < M) & (column < C)
    values = load(x + at, inside)
    if ADD:
        values = rounded(values + load(residual + at, inside), residual)
        store(residual + at, values, inside)
    scale = rms_scale(values, C, eps)[:, None]
    store(out + at, values * scale * load(weight + column, column < C), inside)


@triton.jit
def rms_scale(values, C, eps):
    """What the rows of `[M, BLOCK]`, zeros from column C on, are multiplied by.

    Squares are summed in float32, in an order that depends on BLOCK alone: the norm's bits are the
    same wherever it is computed. fma keeps a square from fusing with the sum behind it.
    """
    return tl.rsqrt(sum_in_pairs(tl.fma(values, values, 0.0)) / C + eps)


def num_warps(columns: int) -> int:
    """16 elements a thread: two 16-byte loads of bfloat16, and few lanes to sum over."""
    return min(16, max(1, tile(columns) // 512))


def launch_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> None:
    """All contiguous; `residual` is added to, if there is one."""
    columns = weight.shape[0]
    if not out.numel():
        return
    rows = out.numel() // columns
    at_once = min(16, tile(rows)) if INTERPRETED.value else 1
    rms_norm_kernel[(triton.cdiv(rows, at_once),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        rows,
        columns,
        eps,
        ADD=residual is not None,
        ROWS=at_once,
        BLOCK=tile(columns),
        num_warps=num_warps(columns),
    )


def normalise(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    check_float(x, "x")
    check_operand(weight, "weight", x, x.dtype, "[C]", x.shape[-1:])
    if residual is not None:
        check_operand(residual, "residual", x, x.dtype, "x's", x.shape)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch_rms_norm(x.contiguous(), residual, weight, eps, out)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return normalise(x, None, weight, eps)
