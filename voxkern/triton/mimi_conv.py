from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check, check_dim, check_float, check_operand
from voxkern.triton.codec_gemm import launch_codec_gemm
from voxkern.triton.language import load, tile_size

MAX_PASTS = 16
"""Convolutions per launch of `update_past`: more than Mimi's decoder has with a past."""


@triton.jit
def update_past_kernel(
    pasts, xs, contexts, steps, widths, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program handles BLOCK_C columns of one stream's past of one convolution."""
    for i in tl.static_range(len(pasts)):
        if tl.program_id(1) == i:
            context, width = contexts[i], widths[i]
            past = pasts[i] + tl.program_id(0).to(tl.int64) * context * width
            x = xs[i] + (tl.program_id(0).to(tl.int64) * steps[i] + steps[i] - context) * width
            block = tl.arange(0, BLOCK_T)[:, None]
            column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
            inside = (block < context) & (column < width)
            offset = block * width + column
            tl.store(past + offset, load(x + offset, inside), mask=inside)


def update_past(convs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set each past `[B, context, C]` to the blocks that precede the next x; x is `[B, T, C]`.

    A separate launch for many convolutions: it runs after all their programs have read the pasts.
    All tensors are contiguous.
    """
    updates = []
    for past, x in convs:
        if past.numel() and x.numel():
            # If x is too short, copy first: a thread must not read what another may have written.
            updates.append((past, torch.cat((past, x), 1) if x.shape[1] < past.shape[1] else x))
    for first in range(0, len(updates), MAX_PASTS):
        pasts, xs = zip(*updates[first : first + MAX_PASTS], strict=True)
        widest = max(past.shape[2] for past in pasts)
        update_past_kernel[(len(pasts[0]), len(pasts), triton.cdiv(widest, 128))](
            pasts,
            xs,
            tuple(past.shape[1] for past in pasts),
            tuple(x.shape[1] for x in xs),
            tuple(past.shape[2] for past in pasts),
            BLOCK_T=tile_size(max(past.shape[1] for past in pasts)),
            BLOCK_C=128,
            num_warps=4,
        )


def launch_mimi_conv(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    dilation: int,
    elu: bool,
) -> Tensor:
    """Checked `mimi_conv` of contiguous tensors, without the update of the past (`update_past`)."""
    check_conv(x, past, weight, bias, add, dilation)
    out = x.new_empty(*x.shape[:2], len(bias))
    launch_codec_gemm(x, weight, out, past=past, dilation=dilation, elu=elu, bias=bias, add=add)
    return out


def check_conv(
    x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None, dilation: int
) -> None:
    check_operand(x, "x", x, torch.float32)
    check_dim(x, "x", 3)
    check_float(weight, "weight")
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    check_dim(weight, "weight", 2 + pair)
    check_dim(bias, "bias", 1)
    (batch, steps, width), outputs = x.shape, len(bias)
    columns = weight.shape[1] * pair
    check(width >= 1, f"x: expected [B, T, C] with C >= 1, got shape {list(x.shape)}")
    check(
        columns >= width and columns % width == 0,
        f"weight: expected columns in a multiple of C = {width}, got shape {list(weight.shape)}",
    )
    letters = "[N / 16, J C / 2, 16, 2]" if pair == 2 else "[N / 16, J C, 16]"
    sizes = (-(-outputs // 16), columns // pair, 16, 2)[: 2 + pair]
    check_operand(weight, "weight", x, weight.dtype, letters, sizes)
    check(dilation >= 1, f"dilation: expected 1 or more, got {dilation}")
    sizes = batch, (columns // width - 1) * dilation, width
    check_operand(past, "past", x, torch.float32, "[B, (J - 1) dilation, C]", sizes)
    check_operand(bias, "bias", x, torch.float32)
    if add is not None:
        check_operand(add, "add", x, torch.float32, "[B, T, N]", (batch, steps, outputs))


def mimi_conv(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    dilation: int,
    elu: bool,
) -> Tensor:
    x, add = x.contiguous(), None if add is None else add.contiguous()
    out = launch_mimi_conv(x, past, weight, bias, add, dilation, elu)
    update_past([(past, x)])
    return out
