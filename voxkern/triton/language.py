"""What the kernels share: products, sums and exponentials, and how large their tiles are.

Triton compiles a kernel anew for an argument that is 1, or a multiple of 16, or not, which would
take seconds in the middle of service. So numbers of rows, tokens and pages are `do_not_specialize`.
"""

import os

import triton
import triton.language as tl

from voxkern.triton.interpreter import prepare

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton's interpreter runs the kernels, on the CPU."""
if INTERPRETED.value:
    prepare()
MOST_ELEMENTS = 2**20
"""Of a tile, by Triton's rule."""


def tile(size: int, least: int = 1) -> int:
    """The power of two that holds `size` elements: the extent of a tile of them."""
    return max(least, triton.next_power_of_2(size))


@triton.jit
def load(pointer, mask):
    """Elements in float32, 0 where masked."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, values, mask):
    """Rounded to the elements' dtype."""
    tl.store(pointer, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def rounded(values, pointer):
    """Float32 as it is once stored there."""
    return values.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def sum_in_pairs(values):
    """Sums of the rows of `[M, N]`, N a power of two: of neighbours, then of neighbouring sums, ..

    What tl.sum adds first depends on how a kernel spreads a tensor over threads; here nothing does.
    """
    rows: tl.constexpr = values.shape[0]
    for _ in tl.static_range(20):
        if values.shape[1] > 1:
            values = tl.sum(tl.reshape(values, (rows, values.shape[1] // 2, 2)), 2)
    return tl.reshape(values, (rows,))


@triton.jit
def dot(a, b, acc):
    """acc + a b, summed in float32: bfloat16 on tensor cores, float32 in float32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def exp(x):
    """e^x to a few units in the last place; tl.exp loses 2^-24 of it for each unit of |x|.

    Products and sums are told to fuse, so that every kernel's results are the same.
    """
    x = tl.where(x < -150.0, -150.0, x)  # minus infinity too
    whole = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    rest = tl.fma(whole, 2.12194440e-4, tl.fma(whole, -0.693359375, x))  # ln 2, in two parts
    return tl.exp2(whole) * tl.exp(rest)
