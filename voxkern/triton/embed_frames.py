import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.checks import check, check_dim, check_float, check_operand, check_shape
from voxkern.triton.language import INTERPRETED, load, store, tile_size


@triton.jit
def embed_frames_kernel(
    frames,
    frame_stride,
    mask,
    mask_stride,
    audio_table,
    text_table,
    out,
    V,
    C,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program handles BLOCK elements of one frame's sum.

    The loop over the frame's columns is unrolled, so that all ids, then all rows, are in flight at
    once. Rows are added in the order of the columns in float32; the sum is rounded once.
    """
    token = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < C
    total = tl.zeros((BLOCK,), tl.float32)
    for column in tl.static_range(COLUMNS):
        is_set = tl.load(mask + token * mask_stride + column) != 0
        row = tl.load(frames + token * frame_stride + column, mask=is_set, other=0)
        if column < COLUMNS - 1:
            table = audio_table + (row + column * V) * C
        else:
            table = text_table + row * C
        total += load(table + element, inside & is_set)
    store(out + token * C + element, total, inside)


def block(columns: int) -> int:
    """Elements per program: 8 bytes of bfloat16 per thread, so that one token makes enough
    programs. Under the interpreter, all of them."""
    return tile_size(columns) if INTERPRETED.value else min(512, tile_size(columns))


def launch_embed_frames(
    frames: Tensor, mask: Tensor, audio_table: Tensor, text_table: Tensor, out: Tensor
) -> None:
    """frames and mask need only their last dimension contiguous."""
    tokens, columns = frames.shape
    width = out.shape[1]
    if out.numel():
        embed_frames_kernel[(tokens, triton.cdiv(width, block(width)))](
            frames,
            frames.stride(0),
            mask,
            mask.stride(0),
            audio_table,
            text_table,
            out,
            audio_table.shape[0] // max(columns - 1, 1),
            width,
            COLUMNS=columns,
            BLOCK=block(width),
            num_warps=4,
        )


def embed_frames(frames: Tensor, mask: Tensor, audio_table: Tensor, text_table: Tensor) -> Tensor:
    check_float(audio_table, "audio_table")
    check_operand(audio_table, "audio_table", frames, audio_table.dtype)
    check_dim(audio_table, "audio_table", 2)
    frames, mask = frames.contiguous(), mask.contiguous()
    check_operand(frames, "frames", frames, torch.int64)
    check(
        frames.dim() == 2 and frames.shape[1] >= 2,
        f"frames: expected shape [T, K + 1] with K >= 1, got {list(frames.shape)}",
    )
    check_operand(mask, "mask", frames, torch.bool, "[T, K + 1]", frames.shape)
    codebooks, width = frames.shape[1] - 1, audio_table.shape[1]
    check(
        audio_table.shape[0] % codebooks == 0,
        f"audio_table: expected [K * V, C] with K = {codebooks}, got {list(audio_table.shape)}",
    )
    check_operand(text_table, "text_table", frames, audio_table.dtype)
    check_shape(text_table, "text_table", "[text vocabulary, C]", (None, width))
    out = audio_table.new_empty((frames.shape[0], width))
    launch_embed_frames(frames, mask, audio_table, text_table, out)
    return out
