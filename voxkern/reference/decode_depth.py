import torch
from torch import Tensor

from voxkern.reference.add_rms_norm import add_rms_norm
from voxkern.reference.append_kv import append_kv
from voxkern.reference.decode_attention import decode_attention
from voxkern.reference.linear import linear, project
from voxkern.reference.rms_norm import rms_norm
from voxkern.reference.sample_tokens import sample_tokens
from voxkern.reference.silu_mul import silu_mul


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
    persistent: bool = False,
) -> Tensor:
    """The composition of the other ops, one position at a time, `persistent` or not.

    Each layer's cache has one page per row, as long as a frame.
    """
    batch_size = hidden.shape[0]
    num_codebooks = heads.shape[0] + 1
    vocab_size = len(audio_rows) // num_codebooks
    head_dim = rope_table.shape[1]
    if bool(((code0 < 0) | (code0 >= vocab_size)).any()):
        raise RuntimeError(f"code0: expected codes of 0 to {vocab_size - 1}")

    k_pages, v_pages = hidden.new_zeros(
        2, len(qkv), batch_size, num_kv_heads, num_codebooks, head_dim
    )
    rows = torch.arange(batch_size, device=hidden.device)
    page_table = rows[:, None].int()
    no_penalty = torch.ones_like(temperature)
    no_history = code0.new_empty(batch_size, 0)

    codes = code0.new_empty(batch_size, num_codebooks)
    codes[:, 0] = code0
    for position in range(num_codebooks):
        if position == 0:
            residual = project(hidden, projection, len(norm))
        else:
            residual = audio_rows[(position - 1) * vocab_size + codes[:, position - 1]]
        positions = torch.full_like(code0, position)
        branch = torch.zeros_like(residual)
        for i in range(len(qkv)):
            x = add_rms_norm(branch, residual, attn_norm[i], eps)
            q, k, v = (
                project(x, qkv[i], (num_heads + 2 * num_kv_heads) * head_dim)
                .unflatten(-1, (-1, head_dim))
                .split((num_heads, num_kv_heads, num_kv_heads), 1)
            )
            slots = rows * num_codebooks + position
            append_kv(q, k, v, rope_table, positions, slots, k_pages[i], v_pages[i])
            attended = decode_attention(
                q, k_pages[i], v_pages[i], page_table, positions.int() + 1, head_dim**-0.5
            )
            branch = project(attended.flatten(1), o[i], len(norm))
            x = add_rms_norm(branch, residual, mlp_norm[i], eps)
            branch = project(silu_mul(linear(x, gate_up[i])), down[i], len(norm))
        residual += branch
        if position > 0:
            codes[:, position] = sample_tokens(
                project(rms_norm(residual, norm, eps), heads[position - 1], vocab_size),
                temperature,
                top_k,
                top_p,
                min_p,
                no_penalty,
                no_history,
                seeds,
                frames,
                position,
            )
    return codes
