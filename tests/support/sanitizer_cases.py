"""Small cases of every op in one process, for compute-sanitizer to watch.

    python tests/support/sanitizer_cases.py native-cuda|native-cpu|simt-cpu

The cases use the op tests' arguments. They are few and small because the tools slow a kernel down a
hundredfold. Results are compared with the references loosely; correctness is the op tests' job.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from op_cases import (
    append_kv,
    decode_attention,
    decode_backbone,
    decode_depth,
    embed_frames,
    linear,
    mimi_conv,
    mimi_convs,
    mimi_transformer,
    prefill_attention,
    sample_tokens,
)
from ops_testing import ALL_TARGETS, DTYPES, Target, reference
from voxkern.persistent import PERSISTENT_DEPTH
from voxkern.quantize import FORMATS, pack

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03}
"""Bounds on the norm of the difference, relative to the norm of the reference."""
SPECIFIED_BY = {PERSISTENT_DEPTH: "decode_depth"}
"""The public op that specifies each private op."""


def cases() -> Iterator[tuple[str, tuple]]:
    """Pairs of an op's name and arguments."""
    for dtype in DTYPES:
        for width in (64, 33):
            x, residual = torch.randn(2, 3, width).to(dtype)
            yield "rms_norm", (x, torch.ones(width, dtype=dtype), 1e-5)
            yield "add_rms_norm", (x, residual, torch.ones(width, dtype=dtype), 1e-5)
            yield "silu_mul", (torch.randn(3, 2 * width).to(dtype),)
        for head_dim in (64, 34):
            yield "append_kv", append_kv.case(9, 4, 2, head_dim, 16, dtype)
            shape = (4, 2, head_dim, 16, dtype)
            yield "decode_attention", decode_attention.case([1, 0, 33, 300], *shape)
            yield "prefill_attention", prefill_attention.case([70, 1, 0], [5, 63, 9], *shape)
        yield "embed_frames", embed_frames.case(5, 5, 17, 40, 33, dtype)
        yield "embed_frames", embed_frames.case(3, 4, 9, 12, 64, dtype)
        for rows, features, columns in ((1, 1056, 50), (3, 33, 7), (17, 256, 40), (70, 128, 24)):
            yield "linear", linear.make((rows,), features, columns, dtype)
        for packing in FORMATS:
            for rows in (1, 5, 20):
                x, weight = linear.make((rows,), 160, 40, dtype)
                yield "linear", (x, pack(weight, packing))
        for vocab in (2051, 33):
            parameters = sample_tokens.mixed_parameters(4, vocab)
            yield (
                "sample_tokens",
                sample_tokens.arguments(torch.randn(4, vocab).to(dtype), **parameters, codebook=3),
            )
        for make, sizes in (
            (lambda s, d: decode_backbone.make(s, d, [1, 40, 300]), decode_backbone),
            (lambda s, d: decode_depth.make(s, d, 3), decode_depth),
        ):
            op = sizes.__name__.removeprefix("op_cases.")
            # Heads of 64, CSM's width, are read as vectors, and use another kernel in decode_depth.
            wide = replace(sizes.SIZES[0], D=64)
            for plain in (*sizes.SIZES[1:3], replace(wide, K=4) if hasattr(wide, "K") else wide):
                yield op, tuple(make(plain, dtype).values())
            for packing in sizes.PACKINGS[:2]:
                arguments = sizes.packed(make(sizes.PACKED_SIZES[1], dtype), packing)
                yield op, tuple(arguments.values())
        # The whole frame as one persistent kernel, with heads of 64 and of 128.
        for packing in ({}, *decode_depth.PACKINGS[:2]):
            sizes = decode_depth.PERSISTENT_SIZES
            if packing:
                sizes = decode_depth.PACKED_PERSISTENT_SIZES
            for size, rows in zip(sizes, (1, 8), strict=True):
                arguments = decode_depth.make(size, dtype, rows)
                arguments = decode_depth.packed(arguments, packing)
                yield PERSISTENT_DEPTH, tuple(arguments.values())
        # 1 row and more than 8 rows have packed kernels of their own; F spans several ranges.
        sizes = replace(decode_backbone.PACKED_SIZES[0], L=1, F=544)
        for packing in decode_backbone.PACKINGS[:2]:
            for rows in (1, 9):
                arguments = decode_backbone.make(sizes, dtype, [3] * rows)
                packed = decode_backbone.packed(arguments, packing)
                yield "decode_backbone", tuple(packed.values())
        yield "mimi_conv", tuple(mimi_conv.make(mimi_conv.SIZES[1], dtype).values())
        yield "mimi_convs", tuple(mimi_convs.make(2, 3, dtype).values())
    yield (
        "mimi_transformer",
        tuple(mimi_transformer.make(mimi_transformer.SIZES[0], [3, 0]).values()),
    )


def copied(arg):
    if isinstance(arg, list | tuple):
        return [copied(a) for a in arg]
    return arg.clone() if isinstance(arg, Tensor) else arg


def check(op: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    if got.is_floating_point():
        got, expected = got.float().nan_to_num(), expected.float().nan_to_num()
        error = (got - expected).norm()
        assert error <= TOLERANCE[dtype] * expected.norm() + 1e-6, f"{op}: off by {error}"
    elif dtype == torch.float32 and op == "sample_tokens":
        assert torch.equal(got, expected), f"{op}: {got} for {expected}"


def run(target: Target) -> dict[str, int]:
    """Run the cases there; returns the number of calls by op. Ops without a kernel are left out."""
    torch.manual_seed(0)
    ran: dict[str, int] = {}
    for op, args in cases():
        if target.why_missing(op):
            continue
        expected = reference(SPECIFIED_BY.get(op, op), *(copied(a) for a in args))
        try:
            got = target.run(op, *args)
        except pytest.skip.Exception:  # packed weights that no kernel supports yet
            continue
        dtypes = {a.dtype for a in args if isinstance(a, Tensor)}
        dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
        if got is not None:
            parts = zip(got, expected, strict=True) if isinstance(got, list) else [(got, expected)]
            for mine, theirs in parts:
                check(op, mine, theirs, dtype)
        ran[op] = ran.get(op, 0) + 1
    return ran


def main(name: str) -> int:
    (target,) = [target for target in ALL_TARGETS if str(target) == name]
    torch.set_num_threads(1)  # the four tools run side by side, one process each
    if reason := target.why_missing():
        print(f"{target}: {reason}")
        return 1
    ran = run(target)
    print(f"{target}: {sum(ran.values())} calls of {len(ran)} ops are right: {ran}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
