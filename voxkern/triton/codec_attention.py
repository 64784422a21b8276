"""Attention of the codec's transformer, fused with rotary embedding and the write to the KV
ring."""

import triton
import triton.language as tl
from torch import Tensor

from voxkern.triton.language import INTERPRETED, dot, load, tile_size

BLOCK_Q = 64 if INTERPRETED.value else 4
"""Queries per iteration: a frame has two steps, and registers hold no more beside the keys."""


@triton.jit(do_not_specialize=["T"])
def codec_attention_kernel(
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
    """One program handles one stream and key/value head. It writes the new keys and values to the
    ring, then attends with all queries, BLOCK_Q at a time, to BLOCK_K keys at a time (online
    softmax). Float32 throughout. It reads the new keys and values from qkv again, so no thread
    reads from the ring what another has just written.

    Key p is in block p // BLOCK_K of the stream, wherever the call begins, and a key outside a
    query's window changes no bit of its result. So the split of a stream into calls changes none.
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
        valid = (t < T) & inside
        slot = ((position + t) % capacity) * D + column
        k = rotated(new_keys + t * stride, rotations + t * D, column, D, valid)
        tl.store(keys + slot, k, mask=valid)
        tl.store(values + slot, load(new_values + t * stride + column, valid), mask=valid)

    for first in range(0, T * group, BLOCK_Q):
        query = first + tl.arange(0, BLOCK_Q)
        t = query // group
        head = h * group + query % group
        valid = (t < T)[:, None] & inside
        row = qkv + t[:, None] * stride + head[:, None] * D
        q = rotated(row, rotations + t[:, None] * D, column, D, valid) * scale

        # From here on, keys are indexed relative to `start`, where the first block begins.
        seen_from = tl.maximum(position + first // group - window + 1, 0)
        start = seen_from // BLOCK_K * BLOCK_K
        unseen = (seen_from - start).to(tl.int32)  # keys before this may hold anything
        old = (position - start).to(tl.int32)
        end = old + tl.minimum((first + BLOCK_Q - 1) // group + 1, T)
        whole = (
            tl.maximum(old, 0) // BLOCK_K * BLOCK_K
        )  # end of the blocks that are entirely in the ring
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
        pointers = out + ((b * T + t) * HQ + head)[:, None] * D + column
        tl.store(pointers, total / weight[:, None], mask=valid)


@triton.jit
def attend(q, k, v, distance, window, state):
    """One block of online softmax: update the largest score, the sum of the weights and the
    weighted sum of the values. A query sees the keys at a distance of 0 to `window - 1` before
    it."""
    largest, weight, total = state
    scores = dot(q, tl.trans(k), tl.zeros(distance.shape, tl.float32))
    scores = tl.where((distance >= 0) & (distance < window), scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # no key seen yet
    weights = tl.exp(scores - shift[:, None])
    factor = tl.exp(largest - shift)
    total = dot(weights, v, total * factor[:, None])
    return new, weight * factor + tl.sum(weights, 1), total


@triton.jit
def rotated(row, rotation, column, D: tl.constexpr, inside):
    """Load rows of a head and rotate each element with its partner half a row away. `rotation`
    holds cosines, then sines."""
    own = load(row + column, inside)
    other = load(row + (column + D // 2) % D, inside)
    cos = load(rotation + column % (D // 2), inside)
    sin = load(rotation + D // 2 + column % (D // 2), inside)
    return own * cos + tl.where(column < D // 2, -other, other) * sin


def block_k(head_dim: int) -> int:
    """Keys per block: 16 KB of keys and 16 KB of values, so that a window of 250 takes few
    iterations. It depends on the head width alone, so that nothing else changes a result."""
    return max(16, 4096 // tile_size(head_dim, 16))


def launch_codec_attention(
    qkv: Tensor,
    rotations: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    out: Tensor,
) -> None:
    """Attention of one layer.

    Args:
        qkv: `[B, T, Hq + 2 Hkv, D]`.
        rotations: `[B, T, D]`, cosines, then sines.
        positions: `[B]` int64.
        keys, values: `[B, Hkv, capacity, D]`, contiguous within a stream, with equal strides.
        window: number of keys that a query sees.
        out: `[B, T, Hq, D]`.
    """
    batch, steps, heads, head_dim = out.shape
    _, kv_heads, capacity, _ = keys.shape
    codec_attention_kernel[(batch, kv_heads)](
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
        BLOCK_D=tile_size(head_dim, 16),
        # Float32 products run from registers: with more warps or two stages, some versions of
        # Triton spill.
        num_warps=4,
        num_stages=1,
        # If only one of the two rotations were contracted to fma, a key read from the ring would
        # differ from the same key computed from qkv.
        enable_fp_fusion=False,
    )
