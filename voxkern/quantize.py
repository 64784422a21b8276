"""Packed weights: int8 and int4 matrices in the order in which the kernels read them.

A packed weight is one contiguous tensor; its dtype identifies the format. Rows are grouped in
blocks of 16, the last one padded with zeros; C is a multiple of 32.

- "int8", int8 `[..., N / 16, 16 C + 64]`: symmetric, one scale per row. Byte `64 i + 4 r + c` is
  row r's column `4 i + c`; 16 scales in float32 follow.
- "int4", uint8 `[..., N / 16, 8 C + C / 2 + 64]`: symmetric, one scale per row and group of 32
  columns. Byte `64 i + 4 r + c` holds row r's columns `8 i + c`, in its low half, and
  `8 i + 4 + c`, both with 8 added. Byte `16 g + r` of the next C / 2 is the scale of row r's group
  g: a sign, 3 bits of exponent and 4 of mantissa, `(-1)^s 2^(e - 7) (1 + m / 16)`. 16 row scales in
  float32 follow; a group's scale is multiplied by its row's.

So four columns of 16 rows are 64 bytes, which one instruction multiplies by four values of x.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

FORMATS = ("int8", "int4")
LAYOUT_VERSION = 2
"""Version of the packed layouts. Increase it with every change, so that no cached weight is
misread."""
BLOCK_ROWS = 16
GROUP = 32
"""Columns that share a scale: in x always, in the weight only for int4."""

_CHUNK = 1 << 18
"""Elements packed at a time, so that packing needs little memory beyond its result."""


def format_of(weight: Tensor) -> str:
    """ "int8", "int4", or "none" for a weight that is not packed."""
    return {torch.int8: "int8", torch.uint8: "int4"}.get(weight.dtype, "none")


def num_rows(weight: Tensor) -> int:
    """N of `[..., N, C]`; for a packed weight, including the padding rows of its last block."""
    if format_of(weight) == "none":
        return weight.shape[-2]
    return BLOCK_ROWS * weight.shape[-2]


def block_rows(weight: Tensor) -> Tensor:
    """Arrange rows in blocks of 16, the last padded with zeros, as `mimi_conv` takes them. The
    values do not change.

    Args:
        weight: `[N, C]`, float32 or bfloat16; C of bfloat16 is even.

    Returns:
        `[N / 16, C, 16]` in float32, `[N / 16, C / 2, 16, 2]` in bfloat16: 16 rows of one column,
        or in bfloat16 of two, are 64 bytes.
    """
    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight, (0, 0, 0, -rows % BLOCK_ROWS))
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    blocks = (
        blocks.view(len(blocks) // BLOCK_ROWS, BLOCK_ROWS, columns // pair, pair)
        .transpose(1, 2)
        .contiguous()
    )
    return blocks if pair == 2 else blocks.squeeze(3)


def unblock_rows(blocks: Tensor) -> Tensor:
    """Undo `block_rows`: `[16 ceil(N / 16), C]`, with the padding rows."""
    if blocks.dim() == 3:
        blocks = blocks.unsqueeze(3)
    columns = blocks.shape[1] * blocks.shape[3]
    return blocks.transpose(1, 2).reshape(BLOCK_ROWS * len(blocks), columns)


def num_columns(weight: Tensor) -> int:
    """C of `[..., N, C]`."""
    last = weight.shape[-1]
    return {"none": last, "int8": (last - 64) // 16, "int4": (last - 64) * 2 // 17}[
        format_of(weight)
    ]


def packed_shape(shape: torch.Size | tuple[int, ...], format: str) -> tuple[int, ...]:
    """The shape of `[..., N, C]` when packed.

    Raises:
        ValueError: the format is unknown, or C is not a multiple of 32.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be {' or '.join(FORMATS)}, got {format}")
    *lead, rows, columns = shape
    if columns % GROUP:
        raise ValueError(f"weight: expected columns in a multiple of {GROUP}, got {columns}")
    blocks = -(-rows // BLOCK_ROWS)
    row_bytes = columns if format == "int8" else columns // 2 + columns // GROUP
    return (*lead, blocks, BLOCK_ROWS * (row_bytes + 4))


def pack(weight: Tensor, format: str) -> Tensor:
    """Pack a weight, on its device.

    Args:
        weight: `[..., N, C]`, floating point, C a multiple of 32.
        format: "int8" or "int4".

    Returns:
        `packed_shape(weight.shape, format)`. Rounds to nearest, ties to even. int8 maps each
        row's largest magnitude to 127. int4 tries four scales per group and keeps the one with the
        least squared error.

    Raises:
        ValueError: the format is unknown, C is not a multiple of 32, or a value is not finite.
    """
    shape = packed_shape(weight.shape, format)
    rows, columns = weight.shape[-2:]
    packed = torch.empty(
        shape, dtype=torch.int8 if format == "int8" else torch.uint8, device=weight.device
    )
    if not packed.numel() or not columns:
        return packed.zero_()
    pack_rows = _pack_int8 if format == "int8" else _pack_int4
    blocks = max(1, _CHUNK // (BLOCK_ROWS * columns))
    matrices = packed.view(-1, *shape[-2:])

    def pack_part(matrix: Tensor, out: Tensor, first: int) -> None:
        part = out[first : first + blocks]
        values = matrix[first * BLOCK_ROWS : (first + blocks) * BLOCK_ROWS].float()
        missing = len(part) * BLOCK_ROWS - len(values)
        pack_rows(torch.nn.functional.pad(values, (0, 0, 0, missing)), part)

    _run_in_parallel(
        pack_part,
        [
            (matrix, out, first)
            for matrix, out in zip(weight.reshape(-1, rows, columns), matrices, strict=True)
            for first in range(0, len(out), blocks)
        ],
        torch.get_num_threads() if weight.device.type == "cpu" else 1,
    )
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The weight that `packed` represents: float32 `[..., 16 ceil(N / 16), C]`."""
    values, group_scales, row_scales = integers(packed)
    return values.float().mul_(group_scales.repeat_interleave(GROUP, -1)).mul_(row_scales)


def integers(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The integers and scales of a packed weight, in the order of its rows and columns.

    Returns:
        values: int8 `[..., N, C]`, -8 to 7 or -128 to 127.
        group_scales: float32 `[..., N, C / 32]`; ones for int8.
        row_scales: float32 `[..., N, 1]`. A weight is value * group scale * row scale.
    """
    int4 = format_of(packed) == "int4"
    value_bytes, scale_bytes = (256, 16) if int4 else (512, 0)  # of a group of 16 rows
    groups = (packed.shape[-1] - 64) // (value_bytes + scale_bytes)
    values, codes, row_scales = packed.split((value_bytes * groups, scale_bytes * groups, 64), -1)
    # [..., block, C / 8 or C / 4, row, 4]
    values = values.unflatten(-1, (value_bytes // 64 * groups, BLOCK_ROWS, 4))
    if int4:
        values = torch.stack((values & 15, values >> 4), -3).flatten(-4, -3).to(torch.int8) - 8
        codes = codes.unflatten(-1, (groups, BLOCK_ROWS)).transpose(-1, -2).flatten(-3, -2)
        group_scales = _decode_scales(codes)
    values = values.transpose(-2, -3).flatten(-2).flatten(-3, -2)
    if not int4:
        group_scales = torch.ones(*values.shape[:-1], groups, device=packed.device)
    row_scales = row_scales.contiguous().view(torch.float32).flatten(-2)
    return values, group_scales, row_scales[..., None]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations as the kernels do on the fly, for a product with a packed weight.

    Symmetric, per group of 32 columns, rounded to nearest, ties to even. A group whose magnitudes
    are all below 1e-30 becomes zero; a group with a value that is not finite has the scale NaN.

    Args:
        x: `[..., C]`, C a multiple of 32.

    Returns:
        values: float32 `[..., C / 32, 32]`, integers of -127 to 127.
        scales: float32 `[..., C / 32]`.
    """
    groups = x.float().unflatten(-1, (x.shape[-1] // GROUP, GROUP))
    largest = groups.abs().amax(-1)
    inverse = torch.full_like(largest, 127) / largest
    values = groups * inverse.where(largest >= 1e-30, 0)[..., None]
    scales = largest / torch.full_like(largest, 127) + largest * 0
    return values.nan_to_num_(0).round_(), scales


def _run_in_parallel(work: Callable, jobs: Sequence[tuple], num_threads: int) -> None:
    """Run jobs in parallel, each on one thread.

    Running them in sequence, each on all threads, takes nearly three times as long: the torch ops
    are small.
    """
    if num_threads == 1 or len(jobs) == 1:
        for job in jobs:
            work(*job)
        return
    inference = torch.is_inference_mode_enabled()

    def do(job: tuple) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(*job)

    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as p:
            list(p.map(do, jobs))
    finally:
        torch.set_num_threads(num_threads)  # the workers' setting is process-wide


def _pack_int8(weight: Tensor, out: Tensor) -> None:
    columns = weight.shape[1]
    largest = weight.abs().amax(1)
    if not math.isfinite(largest.max()):
        raise ValueError("weight: a value is not finite")
    scales = largest / 127
    values = (weight * _inverse(scales)[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    blocked = values.view(-1, BLOCK_ROWS, columns // 4, 4).transpose(1, 2)
    out[:, : BLOCK_ROWS * columns].unflatten(1, (-1, BLOCK_ROWS, 4)).copy_(blocked)
    out[:, BLOCK_ROWS * columns :] = scales.view(-1, BLOCK_ROWS).view(torch.int8)


def _pack_int4(weight: Tensor, out: Tensor) -> None:
    columns = weight.shape[1]
    num_groups = columns // GROUP
    values, codes, row_scales = _int4_groups(weight.reshape(-1, GROUP).T.contiguous(), num_groups)
    # [i, half, 4, block, row, group] -> [half, block, group, i, row, 4]
    split = values.add_(8).to(torch.uint8).view(4, 2, 4, -1, BLOCK_ROWS, num_groups)
    low, high = split.permute(1, 3, 5, 0, 4, 2)
    nibbles, scales, rows = out.split((8 * columns, columns // 2, 64), 1)
    torch.add(low, high, alpha=16, out=nibbles.unflatten(1, (num_groups, 4, BLOCK_ROWS, 4)))
    blocked = codes.view(-1, BLOCK_ROWS, num_groups).transpose(1, 2)
    scales.unflatten(1, (num_groups, BLOCK_ROWS)).copy_(blocked)
    rows.copy_(row_scales.view(-1, BLOCK_ROWS).view(torch.uint8))


def _int4_groups(groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups `[32, N]`, where `num_groups` neighbouring groups form a row.

    The value of largest magnitude maps to about -8, because the negative side has one more step.
    The best ratio of that value to the step depends on the other values, so four are tried; each
    scale is then fitted to its integers by least squares. Row scales are powers of two, so they
    cause no rounding.

    Returns:
        Integers -8 to 7 in float32 `[32, N]`, codes of the group scales `[N]`, and row scales.
    """
    low, high = groups.amin(0), groups.amax(0)
    extreme = torch.where(high > -low, high, low)
    largest = extreme.abs().view(-1, num_groups).amax(1)
    if not math.isfinite(largest.max()):
        raise ValueError("weight: a value is not finite")
    # The power of two for which largest / 7 is between 1 and 2 row scales.
    row_scales = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / 7).exponent - 1)
    inverse = _inverse(row_scales).repeat_interleave(num_groups)
    groups, extreme = groups * inverse, extreme * inverse  # exact, and no overflow
    best: tuple[Tensor, Tensor, Tensor] | None = None
    values, product = torch.empty_like(groups), torch.empty_like(groups)
    for steps in (8.0, 8.5, 7.5, 7.0):
        scales = _nearest_scale(extreme / -steps)
        torch.mul(groups, _inverse(scales), out=values).round_().clamp_(-8, 7)
        dot = torch.mul(values, groups, out=product).sum(0)
        square = torch.mul(values, values, out=product).sum(0)
        scales = _nearest_scale(dot / square.clamp_min(1))
        # Sum of squares minus squared error.
        gain = scales * (2 * dot - scales * square)
        if best is None:
            best = values.clone(), scales, gain
        else:
            best_values, best_scales, best_gain = best
            better = gain > best_gain
            torch.where(better, values, best_values, out=best_values)
            best_scales = torch.where(better, scales, best_scales)
            best = best_values, best_scales, torch.where(better, gain, best_gain)
    assert best is not None
    best_values, best_scales, _ = best
    codes = best_scales.view(torch.int32) >> 19
    return best_values, codes.bitwise_and_(127).add_(best_scales.signbit(), alpha=128), row_scales


def _nearest_scale(scales: Tensor) -> Tensor:
    """Round to the nearest scale that a group can have, keeping the sign."""
    bits = scales.abs().clamp_(2**-7, 31 / 16).view(torch.int32)
    bits = bits.add_(1 << 18).bitwise_and_(-1 << 19)
    return bits.view(torch.float32).copysign_(scales)


def _decode_scales(codes: Tensor) -> Tensor:
    """Float32 values of group scale codes."""
    bits = (codes.int() & 127) + (120 << 4) << 19
    return bits.view(torch.float32) * torch.where(codes > 127, -1, 1)


def _inverse(scales: Tensor) -> Tensor:
    """`1 / scales`, or 0 where that overflows float32: the values of such rows become zeros."""
    inverse = scales.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0)
