"""Fixes for Triton's interpreter (3.6 to 3.8), which also make it fast enough for tests."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def patch_interpreter() -> None:
    """Patch the interpreter of this process.

    Fixes: rounding to bfloat16 to nearest (it truncates), products of bfloat16 (NumPy has none),
    and loops whose bounds are arguments (NumPy 2.4 no longer converts a one-element array to an
    integer).

    Speed: it multiplies transposed matrices element by element; it replaces the language's
    functions at every call of a helper, although once is enough in a process that compiles
    nothing; and it computes every integer sum twice to detect overflow.
    """
    builder = interpreter.InterpreterBuilder
    convert, multiply = interpreter._convert_float, builder.create_dot
    interpreter._convert_float = functools.partial(convert_float, convert)
    builder.create_dot = functools.partialmethod(create_dot, multiply)
    interpreter._patch_lang = functools.partial(patch_once, interpreter._patch_lang, set())
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    np.seterr(all="ignore")  # infinities and NaN are silent, as on a GPU


def convert_float(convert, values, source, target, rounding):
    """Convert values of type `source` to the bits of `target`; `convert` handles the other
    pairs."""
    if (source, target) == (tl.bfloat16, tl.float32):
        return values.astype(np.uint32) << 16
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = bits + 0x7FFF + (bits >> 16 & 1)
        return (np.where(np.isnan(values), 0x7FC00000, nearest) >> 16).astype(np.uint16)
    return convert(values, source, target, rounding)


def create_dot(builder, multiply, a, b, *rest):
    return multiply(builder, contiguous_float(a), contiguous_float(b), *rest)


def contiguous_float(operand):
    """bfloat16 as float32, and contiguous: NumPy multiplies a transposed batch element by
    element."""
    data, dtype = operand.data, operand.dtype.scalar
    if dtype == tl.bfloat16:
        data, dtype = (data.astype(np.uint32) << 16).view(np.float32), tl.float32
    return interpreter.TensorHandle(np.ascontiguousarray(data), dtype)


def patch_once(patch, patched, fn):
    languages = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
    if not languages <= patched:
        patch(fn)
        patched.update(languages)
        tl.tensor.__index__ = lambda self: self.handle.data.item()
    return SimpleNamespace(restore=lambda: None)
