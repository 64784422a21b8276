import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check, check_float
from voxkern.triton.language import INTERPRETED, exp, load, store, tile_size

BLOCK = 1024  # columns per program: 8 elements, 16 bytes of bfloat16, per thread of 128


@triton.jit(do_not_specialize=["M"])
def silu_mul_kernel(gate_up, out, M, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program handles BLOCK columns of ROWS of the M rows (1, more only under the interpreter).

    It computes in float32 and rounds once.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < M) & (column < F)
    gate = load(gate_up + row * 2 * F + column, inside)
    up = load(gate_up + row * 2 * F + F + column, inside)
    store(out + row * F + column, silu(gate) * up, inside)


@triton.jit
def silu(gate):
    """Computed from e^-|gate|, which cannot overflow."""
    e = exp(-tl.abs(gate))
    return gate * tl.where(gate < 0, e, 1.0) / (1.0 + e)


def launch_silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Launch on contiguous tensors."""
    if not out.numel():
        return
    columns = out.shape[-1]
    rows = out.numel() // columns
    rows_per_program = min(256, tile_size(rows)) if INTERPRETED.value else 1
    grid = triton.cdiv(rows, rows_per_program), triton.cdiv(columns, BLOCK)
    silu_mul_kernel[grid](
        gate_up, out, rows, columns, ROWS=rows_per_program, BLOCK=BLOCK, num_warps=4
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    check_float(gate_up, "gate_up")
    check(
        gate_up.dim() > 0 and gate_up.shape[-1] % 2 == 0,
        f"gate_up: expected [..., 2F], got shape {list(gate_up.shape)}",
    )
    out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    launch_silu_mul(gate_up.contiguous(), out)
    return out
