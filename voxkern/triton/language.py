"""Device functions that the kernels share (loads, dot products, sums, exponentials) and tile sizes.

Triton compiles a kernel again when an integer argument becomes 1, or starts or stops being a
multiple of 16. That takes seconds, in the middle of serving. So the numbers of rows, tokens and
pages are `do_not_specialize`.
"""

import os

import triton
import triton.language as tl

from voxkern.triton.interpreter import patch_interpreter

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""True if Triton's interpreter runs the kernels, on the CPU."""
if INTERPRETED.value:
    patch_interpreter()
MAX_ELEMENTS = 2**20
"""Triton's limit on the elements of a tile."""


def tile_size(size: int, minimum: int = 1) -> int:
    """Extent of a tile that holds `size` elements: the next power of two, at least `minimum`."""
    return max(minimum, triton.next_power_of_2(size))


@triton.jit
def load(pointer, mask):
    """Load as float32, 0 where masked out."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, values, mask):
    """Round to the pointer's dtype and store."""
    tl.store(pointer, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def rounded(values, pointer):
    """Float32 values after a round trip through the pointer's dtype."""
    return values.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def sum_in_pairs(values):
    """Row sums of `[M, N]`, N a power of two, as a binary tree: neighbours first, then their sums.

    The order of tl.sum depends on how the compiler lays the tensor out over threads; this order is
    fixed.
    """
    rows: tl.constexpr = values.shape[0]
    for _ in tl.static_range(20):
        if values.shape[1] > 1:
            values = tl.sum(tl.reshape(values, (rows, values.shape[1] // 2, 2)), 2)
    return tl.reshape(values, (rows,))


@triton.jit
def dot(a, b, acc):
    """acc + a b, accumulated in float32; bfloat16 runs on tensor cores, float32 without TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def exp(x):
    """e^x to within a few units in the last place; the relative error of tl.exp grows by 2^-24 for
    each unit of |x|.

    Each product and sum is an explicit fma, so that all kernels give the same bits.
    """
    x = tl.where(x < -150.0, -150.0, x)  # handles minus infinity too
    whole = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    rest = tl.fma(whole, 2.12194440e-4, tl.fma(whole, -0.693359375, x))  # ln 2 in two parts
    return tl.exp2(whole) * tl.exp(rest)
