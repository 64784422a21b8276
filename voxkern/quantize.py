"""Packed weights: int8 and int4 matrices in the order in which the kernels read them.

A packed weight is one contiguous tensor; its dtype tells the format. Rows go in blocks of 16, the
last filled up with zeros; C is a multiple of 32.

- "int8", int8 `[..., N / 16, 16 C + 64]`: symmetric, a scale for each row. Byte `64 i + 4 r + c` is
  row r's column `4 i + c`; 16 scales in float32 follow.
- "int4", uint8 `[..., N / 16, 8 C + C / 2 + 64]`: symmetric, a scale for each row's group of 32
  columns. Byte `64 i + 4 r + c` holds row r's columns `8 i + c`, in its low half, and
  `8 i + 4 + c`, both 8 too large. Byte `16 g + r` of the next C / 2 is the scale of row r's group
  g: a sign, 3 bits of exponent and 4 of mantissa, `(-1)^s 2^(e - 7) (1 + m / 16)`. 16 scales of
  the rows in float32, which those are multiplied with, follow.

So four columns of 16 rows are 64 bytes, what one instruction multiplies by four values of x.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

FORMATS = ("int8", "int4")
LAYOUT_VERSION = 2
"""Of `pack`'s results; to be raised with every change of them, so that none kept is misread."""
BLOCK_ROWS = 16
GROUP = 32
"""Columns that share a scale: always in x, in the weight if it is int4."""

_CHUNK = 1 << 18
"""Elements packed at a time, so that packing needs little memory besides its result."""


def format_of(weight: Tensor) -> str:
    """ "int8", "int4", or "none" for a weight that is not packed."""
    return {torch.int8: "int8", torch.uint8: "int4"}.get(weight.dtype, "none")


def num_rows(weight: Tensor) -> int:
    """N of `[..., N, C]`; of a packed weight with the rows that fill its last block."""
    if format_of(weight) == "none":
        return weight.shape[-2]
    return BLOCK_ROWS * weight.shape[-2]


def block_rows(weight: Tensor) -> Tensor:
    """Rows in blocks of 16, unrounded, the last filled up with zeros: what `mimi_conv` takes.

    Args:
        weight: `[N, C]`, float32 or bfloat16; C of bfloat16 is even.

    Returns:
        `[N / 16, C, 16]` in float32, `[N / 16, C / 2, 16, 2]` in bfloat16: a column of 16 rows is
        64 bytes, or two are.
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
    """`[16 ceil(N / 16), C]` of what `block_rows` returns."""
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
        ValueError: there is no such format, or C is no multiple of 32.
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
    """A weight in a packed format, on its device.

    Args:
        weight: `[..., N, C]`, floating point, C a multiple of 32.
        format: "int8" or "int4".

    Returns:
        `packed_shape(weight.shape, format)`. Rounding to nearest, ties to even. int8 keeps each
        row's largest magnitude. int4 gives a group the scale, of four tried, whose error is least
        in squares.

    Raises:
        ValueError: there is no such format, C does not fit it, or a value is not finite.
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

    _on_all_threads(
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
    """The weight that `packed` stands for: float32 `[..., 16 ceil(N / 16), C]`."""
    values, group_scales, row_scales = integers(packed)
    return values.float().mul_(group_scales.repeat_interleave(GROUP, -1)).mul_(row_scales)


def integers(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a packed weight holds, in the order of its rows and columns.

    Returns:
        values: int8 `[..., N, C]`, -8 to 7 or -128 to 127.
        group_scales: float32 `[..., N, C / 32]`; ones in int8.
        row_scales: float32 `[..., N, 1]`, which both are multiplied with.
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
    """Activations as the kernels quantize them on the fly, for a product with a packed weight.

    Symmetric, a group of 32 columns at a time, rounded to nearest, ties to even. A group whose
    values are all below 1e-30 is zero; one with a value that is not finite has the scale NaN.

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


def _on_all_threads(work: Callable, jobs: Sequence[tuple], num_threads: int) -> None:
    """Do jobs side by side, each on one of torch's threads.

    One after the other, each on all threads, takes nearly three times as long: the ops are small.
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
        torch.set_num_threads(num_threads)  # the threads set it for others too


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
    """Integers -8 to 7 of groups `[32, N]`, in float32, their scales' codes `[N]` and the scales
    of the rows, each of `num_groups` neighbouring groups.

    The value of largest magnitude becomes about -8: the negative side has one step more. Which
    fraction of it the step should be depends on the other values; the scale is then fitted to the
    integers by least squares. Rows' scales are powers of two: they round nothing.
    """
    low, high = groups.amin(0), groups.amax(0)
    extreme = torch.where(high > -low, high, low)
    largest = extreme.abs().view(-1, num_groups).amax(1)
    if not math.isfinite(largest.max()):
        raise ValueError("weight: a value is not finite")
    # So that largest / 7 is between 1 and 2 of them.
    row_scales = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / 7).exponent - 1)
    inverse = _inverse(row_scales).repeat_interleave(num_groups)
    groups, extreme = groups * inverse, extreme * inverse  # exact, and far from overflow
    best_values, best_scales, best_gain = None, None, None
    values, product = torch.empty_like(groups), torch.empty_like(groups)
    for steps in (8.0, 8.5, 7.5, 7.0):
        scales = _nearest_scale(extreme / -steps)
        torch.mul(groups, _inverse(scales), out=values).round_().clamp_(-8, 7)
        dot = torch.mul(values, groups, out=product).sum(0)
        square = torch.mul(values, values, out=product).sum(0)
        scales = _nearest_scale(dot / square.clamp_min(1))
        # How much less than the sum of squares the error is.
        gain = scales * (2 * dot - scales * square)
        if best_values is None:
            best_values, best_scales, best_gain = values.clone(), scales, gain
        else:
            better = gain > best_gain
            torch.where(better, values, best_values, out=best_values)
            best_scales = torch.where(better, scales, best_scales)
            best_gain = torch.where(better, gain, best_gain)
    codes = best_scales.view(torch.int32) >> 19
    return best_values, codes.bitwise_and_(127).add_(best_scales.signbit(), alpha=128), row_scales


def _nearest_scale(scales: Tensor) -> Tensor:
    """Of those that a group can have."""
    bits = scales.abs().clamp_(2**-7, 31 / 16).view(torch.int32)
    bits = bits.add_(1 << 18).bitwise_and_(-1 << 19)
    return bits.view(torch.float32).copysign_(scales)


def _decode_scales(codes: Tensor) -> Tensor:
    bits = (codes.int() & 127) + (120 << 4) << 19
    return bits.view(torch.float32) * torch.where(codes > 127, -1, 1)


def _inverse(scales: Tensor) -> Tensor:
    """`1 / scales`, and 0 where that is too large for float32: such values are zeros."""
    inverse = scales.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0)
