import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check_float, check_operand
from voxkern.triton.language import INTERPRETED, load, rounded, store, sum_in_pairs, tile_size


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
    """One program holds ROWS of the M rows in registers (1, more only under the interpreter).

    With ADD, the sum with the residual is rounded as it is stored before it is squared. The result
    is rounded once.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    offset = row * C + column
    inside = (row < M) & (column < C)
    values = load(x + offset, inside)
    if ADD:
        values = rounded(values + load(residual + offset, inside), residual)
        store(residual + offset, values, inside)
    scale = rms_scale(values, C, eps)[:, None]
    store(out + offset, values * scale * load(weight + column, column < C), inside)


@triton.jit
def rms_scale(values, C, eps):
    """Reciprocal root mean square of the rows of `[M, BLOCK]`, which are zero from column C on.

    Squares are summed in float32 in an order that depends on BLOCK alone, so that the norm has the
    same bits in every kernel. The explicit fma keeps the compiler from fusing a square with the
    sum that follows.
    """
    return tl.rsqrt(sum_in_pairs(tl.fma(values, values, 0.0)) / C + eps)


def num_warps(columns: int) -> int:
    """16 elements per thread: two 16-byte loads of bfloat16, and few lanes to sum over."""
    return min(16, max(1, tile_size(columns) // 512))


def launch_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> None:
    """Launch on contiguous tensors; x is added to `residual` first if one is given."""
    columns = weight.shape[0]
    if not out.numel():
        return
    rows = out.numel() // columns
    rows_per_program = min(16, tile_size(rows)) if INTERPRETED.value else 1
    rms_norm_kernel[(triton.cdiv(rows, rows_per_program),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        rows,
        columns,
        eps,
        ADD=residual is not None,
        ROWS=rows_per_program,
        BLOCK=tile_size(columns),
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
