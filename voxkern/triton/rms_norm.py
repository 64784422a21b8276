import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check_float, check_operand
from voxkern.triton.language import load, store, tile


@triton.jit
def rms_norm_kernel(x, residual, weight, out, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program takes a row, all of it in registers.

    Squares are summed in float32. With ADD the sum with the residual is rounded before it is
    squared, as it is stored. The result is rounded once.
    """
    at = tl.program_id(0).to(tl.int64) * C
    column = tl.arange(0, BLOCK)
    inside = column < C
    values = load(x + at + column, inside)
    if ADD:
        values += load(residual + at + column, inside)
        values = values.to(residual.dtype.element_ty)
        tl.store(residual + at + column, values, mask=inside)
        values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / C + eps)
    store(out + at + column, values * scale * load(weight + column, inside), inside)


def num_warps(columns: int) -> int:
    """16 elements a thread: two 16-byte loads of bfloat16, and few lanes to sum over."""
    return min(16, max(1, tile(columns) // 512))


def launch_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> None:
    """All contiguous; `residual` is added to, if there is one."""
    columns = weight.shape[0]
    if out.numel():
        rms_norm_kernel[(out.numel() // columns,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            columns,
            eps,
            ADD=residual is not None,
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
