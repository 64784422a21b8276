"""Positions run one after another. Each layer takes five launches, eight with more than 16 rows;
each position adds two: the last norm with the head, and the draw, which also looks up the embedding
of the drawn code.

Estimated us at batch 1 in bfloat16 on an H100, at 3.35 TB/s (not measured):

    launch                  programs     weights
    norm, qkv                     96      3.1 MB   0.9
    rope, append, attention        8         -     about 2
    o, residual                   64      2.1 MB   0.6
    norm, gate, up, SwiGLU       512     33.6 MB  10.0
    down, residual                64     16.8 MB   5.0
    norm, head (a position)      129      4.2 MB   1.3
    draw, look-up (a position)     1         -     1 (greedy) to 5

703 launches (1350 with one launch per op): 31 x 22, 18 for the first position, whose last layer
only writes keys and values, and 3 before them. Memory traffic takes 2.1 ms; each launch adds the 1
to 2 us before its first bytes arrive.
"""

import torch
from torch import Tensor

from voxkern.triton.checks import check, check_dim, check_float, check_operand
from voxkern.triton.depth_attention import launch_depth_attention
from voxkern.triton.layers import Layers
from voxkern.triton.linear import check_matrix
from voxkern.triton.sample_tokens import check_sampling, launch_sample_tokens


def decode_depth(
    hidden: Tensor,
    code0: Tensor,
    audio_rows: Tensor,
    projection: Tensor,
    attn_norm: Tensor,
    qkv: Tensor,
    o: Tensor,
    mlp_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    norm: Tensor,
    heads: Tensor,
    rope_table: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    frames: Tensor,
) -> Tensor:
    """`code0` is never checked on the host: a code outside the table reads the nearest row."""
    check_float(hidden, "hidden")
    check_dim(hidden, "hidden", 2)
    check_dim(projection, "projection", 2)
    check_dim(heads, "heads", 3)
    check_operand(audio_rows, "audio_rows", hidden, hidden.dtype)
    check_dim(audio_rows, "audio_rows", 2)
    batch, num_codebooks = hidden.shape[0], heads.shape[0] + 1
    vocab_size, width = audio_rows.shape[0] // num_codebooks, audio_rows.shape[1]
    check(
        num_codebooks >= 2,
        f"heads: expected [K - 1, V, C] with K >= 2, got {list(heads.shape)}",
    )
    check(
        vocab_size >= 1 and audio_rows.shape[0] == num_codebooks * vocab_size and width >= 1,
        f"audio_rows: expected [K * V, C] with K = {num_codebooks}, got {list(audio_rows.shape)}",
    )
    layers = Layers(
        *(attn_norm, qkv, o, mlp_norm, gate_up, down, norm, rope_table),
        *(num_heads, num_kv_heads, eps),
    )
    layers.check(hidden, width)
    check(
        rope_table.shape[0] >= num_codebooks,
        f"rope_table: expected [at least K, D] with K = {num_codebooks}, got "
        f"{list(rope_table.shape)}",
    )
    check_operand(code0, "code0", hidden, torch.int64, "[B]", (batch,))
    check_sampling(hidden, batch, temperature, top_k, top_p, min_p, seeds, frames)
    check_matrix(projection, "projection", hidden, "[C, Cb]", (width, hidden.shape[1]))
    sizes = num_codebooks - 1, vocab_size, width
    check_matrix(heads, "heads", hidden, "[K - 1, V, C]", sizes)

    codes = code0.new_empty(batch, num_codebooks)
    codes[:, 0] = code0
    embedded = audio_rows.index_select(0, code0.clamp(0, vocab_size - 1))
    cache = hidden.new_empty(2, len(qkv), batch, num_kv_heads, num_codebooks, rope_table.shape[1])
    for position in range(num_codebooks):

        def attend(layer: int, qkv: Tensor, attended: Tensor, position: int = position) -> None:
            k_cache, v_cache = cache[:, layer]
            launch_depth_attention(qkv, rope_table, k_cache, v_cache, position, attended)

        if position == 0:
            x = layers.project(hidden.contiguous(), projection, width)
            layers.run(x, attend, keys_only=True)
            continue
        x = layers.run(embedded, attend)
        launch_sample_tokens(
            layers.project(x, heads[position - 1], vocab_size, norm),
            *(temperature, top_k, top_p, min_p, None, None, seeds, frames),
            position,
            codes[:, position],
            audio_rows,
            embedded,
        )
    return codes
