"""Attention of the codec's transformer, with rotation and the new keys and values."""

import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.language import INTERPRETED, dot, load, tile

BLOCK_Q = 64 if INTERPRETED.value else 4
"""Queries at a time: a frame's steps are two, and registers hold no more beside the keys."""


@triton.jit(do_not_specialize=["T"])
def mimi_attention_kernel(
    qkv,
    rotations,
    positions,
    keys,
    values,
    stream_stride,
    out,
    T,
    capacity,
    window,
    scale,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes a stream and a key/value head: it writes the new keys and values to their
    ring, then attends with all queries, BLOCK_Q at a time, to BLOCK_K keys at a time (online
    softmax). Float32 throughout. What it wrote it takes from qkv again, and so no thread reads what
    another has written.

    Key p is in block p // BLOCK_K of the stream, wherever the call begins, and a key that a query
    does not see changes no bit of its result: so neither does how a stream is cut.
    """
    group: tl.constexpr = HQ // HKV
    stride: tl.constexpr = (HQ + 2 * HKV) * D
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    position = tl.load(positions + b)
    qkv += b * T * stride
    rotations += b * T * D
    keys += b * stream_stride + h.to(tl.int64) * capacity * D
    values += b * stream_stride + h.to(tl.int64) * capacity * D
    new_keys = qkv + (HQ + h) * D
    new_values = new_keys + HKV * D
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = column < D

    for first in range(0, T, BLOCK_Q):
        t = first + tl.arange(0, BLOCK_Q)[:, None]
        real = (t < T) & inside
        slot = ((position + t) % capacity) * D + column
        k = rotated(new_keys + t * stride, rotations + t * D, column, D, real)
        tl.store(keys + slot, k, mask=real)
        tl.store(values + slot, load(new_values + t * stride + column, real), mask=real)

    for first in range(0, T * group, BLOCK_Q):
        query = first + tl.arange(0, BLOCK_Q)
        t = query // group
        head = h * group + query % group
        real = (t < T)[:, None] & inside
        row = qkv + t[:, None] * stride + head[:, None] * D
        q = rotated(row, rotations + t[:, None] * D, column, D, real) * scale

        # From here on keys are counted from the first block's, which begins at `start`.
        seen_from = tl.maximum(position + first // group - window + 1, 0)
        start = seen_from // BLOCK_K * BLOCK_K
        unseen = (seen_from - start).to(tl.int32)  # they may hold anything
        old = (position - start).to(tl.int32)
        end = old + tl.minimum((first + BLOCK_Q - 1) // group + 1, T)
        whole = tl.maximum(old, 0) // BLOCK_K * BLOCK_K  # of blocks that are in the ring as a whole
        first_slot = (start % capacity).to(tl.int32)
        state = (
            tl.full((BLOCK_Q,), float("-inf"), tl.float32),
            tl.zeros((BLOCK_Q,), tl.float32),
            tl.zeros((BLOCK_Q, BLOCK_D), tl.float32),
        )
        for begin in range(0, whole, BLOCK_K):
            key = begin + tl.arange(0, BLOCK_K)
            slot = (((first_slot + key) % capacity) * D)[:, None] + column
            is_old = (key >= unseen)[:, None] & inside
            k, v = load(keys + slot, is_old), load(values + slot, is_old)
            state = attend(q, k, v, (old + t)[:, None] - key[None, :], window, state)
        for begin in tl.range(whole, end, BLOCK_K, num_stages=1):
            key = begin + tl.arange(0, BLOCK_K)
            slot = (((first_slot + key) % capacity) * D)[:, None] + column
            is_old = ((key >= unseen) & (key < old))[:, None] & inside
            k, v = load(keys + slot, is_old), load(values + slot, is_old)
            step = (key - old)[:, None]
            is_new = ((key >= unseen) & (key >= old) & (key < end))[:, None] & inside
            k += rotated(new_keys + step * stride, rotations + step * D, column, D, is_new)
            v += load(new_values + step * stride + column, is_new)
            state = attend(q, k, v, (old + t)[:, None] - key[None, :], window, state)
        _, weight, total = state
        place = out + ((b * T + t) * HQ + head)[:, None] * D + column
        tl.store(place, total / weight[:, None], mask=real)


@triton.jit
def attend(q, k, v, behind, window, state):
    """The largest score, the sum of the weights and that of the weighted values so far; a query
    sees the keys that are 0 to `window - 1` behind it."""
    largest, weight, total = state
    scores = dot(q, tl.trans(k), tl.zeros(behind.shape, tl.float32))
    scores = tl.where((behind >= 0) & (behind < window), scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet
    weights = tl.exp(scores - shift[:, None])
    factor = tl.exp(largest - shift)
    total = dot(weights, v, total * factor[:, None])
    return new, weight * factor + tl.sum(weights, 1), total


@triton.jit
def rotated(row, rotation, column, D: tl.constexpr, inside):
    """Rows of a head, each element turned with the one half a row away; cosines, then sines."""
    own = load(row + column, inside)
    other = load(row + (column + D // 2) % D, inside)
    cos = load(rotation + column % (D // 2), inside)
    sin = load(rotation + D // 2 + column % (D // 2), inside)
    return own * cos + tl.where(column < D // 2, -other, other) * sin


def block_k(head_dim: int) -> int:
    """Keys of a block: 16 KB of them and as much of values, for a window of 250 in a few turns. By
    the width alone, so that nothing else changes a result."""
    return max(16, 4096 // tile(head_dim, 16))


def launch_mimi_attention(
    qkv: Tensor,
    rotations: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    out: Tensor,
) -> None:
    """One layer's.

    Args:
        qkv: `[B, T, Hq + 2 Hkv, D]`.
        rotations: `[B, T, D]`, cosines, then sines.
        positions: `[B]` int64.
        keys, values: `[B, Hkv, capacity, D]`, a stream's contiguous, of one stride.
        window: keys that a query sees.
        out: `[B, T, Hq, D]`.
    """
    batch, steps, heads, head_dim = out.shape
    _, kv_heads, capacity, _ = keys.shape
    mimi_attention_kernel[(batch, kv_heads)](
        qkv,
        rotations,
        positions,
        keys,
        values,
        keys.stride(0),
        out,
        steps,
        capacity,
        window,
        head_dim**-0.5,
        HQ=heads,
        HKV=kv_heads,
        D=head_dim,
        BLOCK_Q=BLOCK_Q,
        BLOCK_K=256 if INTERPRETED.value else block_k(head_dim),
        BLOCK_D=tile(head_dim, 16),
        # Float32 is multiplied out of registers: with more warps, or two stages, some version of
        # Triton spills.
        num_warps=4,
        num_stages=1,
        # Contracted here but not there, a key would be another from the ring than from qkv.
        enable_fp_fusion=False,
    )
