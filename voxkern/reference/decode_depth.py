from functools import partial

import torch
from torch import Tensor

from voxkern.layers import LlamaLayers
from voxkern.reference.append_kv import append_kv
from voxkern.reference.decode_attention import decode_attention
from voxkern.reference.layers import run_layers
from voxkern.reference.linear import project
from voxkern.reference.rms_norm import rms_norm
from voxkern.reference.sample_tokens import sample_tokens


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
    """The composition of the other ops, one position at a time.

    Each layer's cache has one page per row, as long as a frame.
    """
    weights = (attn_norm, qkv, o, mlp_norm, gate_up, down, norm, rope_table)
    layers = LlamaLayers(*weights, num_heads, num_kv_heads, eps)
    batch_size = hidden.shape[0]
    num_codebooks = heads.shape[0] + 1
    vocab_size = len(audio_rows) // num_codebooks
    if bool(((code0 < -1) | (code0 >= vocab_size)).any()):
        raise RuntimeError(f"code0: expected codes of -1 to {vocab_size - 1}")

    k_pages, v_pages = hidden.new_zeros(
        2, len(qkv), batch_size, num_kv_heads, num_codebooks, layers.head_dim
    )
    rows = torch.arange(batch_size, device=hidden.device)
    page_table = rows[:, None].int()
    no_penalty = torch.ones_like(temperature)
    no_history = code0.new_empty(batch_size, 0)

    def attend(position: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.full_like(code0, position)
        slots = rows * num_codebooks + position
        pages = k_pages[layer], v_pages[layer]
        append_kv(q, k, v, rope_table, positions, slots, *pages)
        seq_lens = positions.int() + 1
        return decode_attention(q, *pages, page_table, seq_lens, layers.head_dim**-0.5)

    codes = code0.new_empty(batch_size, num_codebooks)
    codes[:, 0] = code0
    for position in range(num_codebooks):
        if position == 0:
            x = project(hidden, projection, layers.width)
        else:
            previous = codes[:, position - 1].clamp(min=0)  # sample_tokens may have drawn none
            x = audio_rows[(position - 1) * vocab_size + previous]
        x = rms_norm(run_layers(layers, x, partial(attend, position)), norm, eps)
        if position == 0:
            continue
        codes[:, position] = sample_tokens(
            project(x, heads[position - 1], vocab_size),
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
