"""Fixes for Triton's interpreter (3.6 to 3.8), which also make it fast enough for tests."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

TERMS_AT_ONCE = 2**16
"""Products of two floating-point numbers that a dot computes before it adds them: 256 KB."""


def patch_interpreter() -> None:
    """Patch the interpreter of this process.

    Fixes: rounding to bfloat16 to nearest (it truncates), products of bfloat16 (NumPy has none),
    the order of a product's sums (NumPy leaves it to a BLAS, whose order depends on the number of
    rows and on the processor), and loops whose bounds are arguments (NumPy 2.4 no longer converts
    a one-element array to an integer).

    Speed: it replaces the language's functions at every call of a helper, although once is enough
    in a process that compiles nothing; it computes every integer sum twice to detect overflow; it
    derives the same types and shapes again for the result of every operation; and it compares the
    shapes of operands dimension by dimension in Triton's types.
    """
    builder = interpreter.InterpreterBuilder
    convert, multiply = interpreter._convert_float, builder.create_dot
    interpreter._convert_float = functools.partial(convert_float, convert)
    builder.create_dot = functools.partialmethod(create_dot, multiply)
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
    interpreter._patch_lang = functools.partial(patch_once, interpreter._patch_lang, set())
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    interpreter._get_np_dtype = functools.partial(numpy_type, interpreter._get_np_dtype, {})
    tl.block_type.__init__ = remembering_block(tl.block_type.__init__)
    tl.tensor.__init__ = remembering_tensor(tl.tensor.__init__)
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


def create_dot(builder, multiply, a, b, d, *rest):
    """a `[..., M, K]` times b `[..., K, N]` plus d. Floating-point sums run from the first of K to
    the last, as on a GPU they have one order for all rows; integers go to `multiply`."""
    if not a.dtype.scalar.is_floating():
        return multiply(builder, a, b, d, *rest)
    a = np.moveaxis(as_float(a), -1, 0)[..., None]
    b = np.moveaxis(as_float(b), -2, 0)[..., None, :]
    out = np.zeros_like(d.data)
    step = max(1, TERMS_AT_ONCE // out.size)
    products = np.empty((min(step, len(a)), *out.shape), out.dtype)
    for k in range(0, len(a), step):
        terms = np.multiply(a[k : k + step], b[k : k + step], out=products[: len(a) - k])
        terms[0] += out
        # Term after term: NumPy sums in pairs along the last axis only.
        np.add.reduce(terms, 0, out=out)
    return interpreter.TensorHandle(out + d.data, d.dtype.scalar)


def broadcast_impl_value(semantic, *operands):
    """Two operands, each in the shape that they have together; two scalars stay scalars."""
    shapes = [tuple(x.type.shape) if x.type.is_block() else () for x in operands]
    shape = shapes[0] if shapes[0] == shapes[1] else np.broadcast_shapes(*shapes)
    return tuple(
        x if own == shape else expanded(x, own, shape)
        for x, own in zip(operands, shapes, strict=True)
    )


def expanded(x, own, shape):
    values = np.broadcast_to(x.handle.data.reshape(own), shape)
    handle = interpreter.TensorHandle(values, x.handle.dtype)
    return tl.tensor(handle, tl.block_type(x.type.scalar, list(shape)))


def as_float(operand):
    """The values of a float32 or bfloat16 operand as float32."""
    if operand.dtype.scalar == tl.bfloat16:
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    return operand.data


def patch_once(patch, patched, fn):
    languages = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
    if not languages <= patched:
        patch(fn)
        patched.update(languages)
        tl.tensor.__index__ = lambda self: self.handle.data.item()
    return SimpleNamespace(restore=lambda: None)


def numpy_type(find, found, dtype):
    """`find(dtype)`, once for each dtype."""
    scalar = dtype.scalar
    if scalar.name not in found:
        found[scalar.name] = find(scalar)
    return found[scalar.name]


def remembering_block(init):
    """The constructor of a block type, with the results of earlier calls for the same shape."""
    found = {}

    def remember(self, element_ty, shape):
        key = element_ty.name, *(getattr(extent, "value", extent) for extent in shape)
        if key not in found:
            init(self, element_ty, shape)
            found[key] = vars(self).copy()
        vars(self).update(found[key], element_ty=element_ty)

    return remember


def remembering_tensor(init):
    """The constructor of a tensor, with the shapes of earlier ones."""
    found = {}

    def remember(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key not in found:
            init(self, handle, type)
            found[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(found[key], handle=handle, type=type, dtype=type.scalar)

    return remember
