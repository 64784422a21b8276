"""What the kernels share: products and exponentials, and how large their tiles are."""

import os

import triton
import triton.language as tl

from voxkern.triton.interpreter import prepare

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether Triton's interpreter runs the kernels, on the CPU."""
if INTERPRETED.value:
    prepare()


def tile(size: int, least: int = 1) -> int:
    """The power of two that holds `size` elements: the extent of a tile of them."""
    return max(least, triton.next_power_of_2(size))


@triton.jit
def load(pointer, mask):
    """Elements in float32, 0 where masked."""
    return widen(tl.load(pointer, mask=mask, other=0.0))


@triton.jit
def store(pointer, values, mask):
    tl.store(pointer, narrow(values, pointer.dtype.element_ty), mask=mask)


@triton.jit
def widen(values):
    """To float32."""
    if INTERPRETED and values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest, ties to even; the interpreter's own conversion truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b, summed in float32: bfloat16 on tensor cores, float32 in float32."""
    if INTERPRETED:  # NumPy has no bfloat16
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def exp(x):
    """e^x to a few units in the last place; tl.exp loses 2^-24 of it for each unit of |x|."""
    x = tl.where(x < -150.0, -150.0, x)  # minus infinity too
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = x - whole * 0.693359375 + whole * 2.12194440e-4  # ln 2, in two parts
    return tl.exp2(whole) * tl.exp(rest)
