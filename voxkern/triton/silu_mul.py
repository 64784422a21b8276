import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check, check_float
from voxkern.triton.language import INTERPRETED, exp, load, store, tile

BLOCK = 1024  # columns a program: 8 elements, 16 bytes of bfloat16, for each of 128 threads


@triton.jit(do_not_specialize=["M"])
def silu_mul_kernel(gate_up, out, M, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes BLOCK columns of ROWS rows of M (1, but when interpreted); float32 inside,
    rounded once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < M) & (column < F)
    gate = load(gate_up + row * 2 * F + column, inside)
    up = load(gate_up + row * 2 * F + F + column, inside)
    store(out + row * F + column, silu(gate) * up, inside)


@triton.jit
def silu(gate):
    """By way of e^-|gate|, which cannot overflow."""
    e = exp(-tl.abs(gate))
    return gate * tl.where(gate < 0, e, 1.0) / (1.0 + e)


def launch_silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Both contiguous."""
    if not out.numel():
        return
    columns = out.shape[-1]
    rows = out.numel() // columns
    at_once = min(256, tile(rows)) if INTERPRETED.value else 1
    grid = triton.cdiv(rows, at_once), triton.cdiv(columns, BLOCK)
    silu_mul_kernel[grid](gate_up, out, rows, columns, ROWS=at_once, BLOCK=BLOCK, num_warps=4)


def silu_mul(gate_up: Tensor) -> Tensor:
    check_float(gate_up, "gate_up")
    check(
        gate_up.dim() > 0 and gate_up.shape[-1] % 2 == 0,
        f"gate_up: expected [..., 2F], got shape {list(gate_up.shape)}",
    )
    out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    launch_silu_mul(gate_up.contiguous(), out)
    return out
