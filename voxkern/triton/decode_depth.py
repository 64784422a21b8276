import torch
from torch import Tensor

from voxkern.triton.checks import check, check_dim, check_float, check_operand
from voxkern.triton.layers import Layers, Places, project
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
    """One position after the other, with a page of K positions for each row.

    Nothing waits on the host, so code0 is not looked at: a code outside reads the nearest row.
    """
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
    head_dim = rope_table.shape[1]
    k_pages, v_pages = hidden.new_empty(2, len(qkv), batch, num_kv_heads, num_codebooks, head_dim)
    rows = torch.arange(batch, device=hidden.device)
    page_table = rows[:, None].int()
    all_positions = torch.arange(num_codebooks, device=hidden.device)[:, None].repeat(1, batch)
    all_slots = rows * num_codebooks + all_positions
    all_lens = all_positions.int() + 1
    no_penalty = torch.ones_like(temperature)
    for position in range(num_codebooks):
        places = Places(
            *(all_positions[position], all_slots[position], k_pages, v_pages),
            *(page_table, all_lens[position]),
        )
        if position == 0:
            layers.run(project(hidden.contiguous(), projection, width), places)
            continue
        before = codes[:, position - 1].clamp(0, vocab_size - 1) + (position - 1) * vocab_size
        x = layers.run(audio_rows.index_select(0, before), places)
        launch_sample_tokens(
            project(x, heads[position - 1], vocab_size),
            *(temperature, top_k, top_p, min_p, no_penalty),
            None,
            seeds,
            frames,
            position,
            codes[:, position],
        )
    return codes
