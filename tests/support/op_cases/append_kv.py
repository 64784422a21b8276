"""Arguments of append_kv."""

import torch


def rope_table(max_positions: int, head_dim: int, theta: float = 1e4) -> torch.Tensor:
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), -1)


def case(tokens, heads, kv_heads, head_dim, page_size, dtype=torch.float32, max_positions=2048):
    """append_kv's arguments: q, k, v are views of one projection, pages are NaN, slots distinct."""
    num_pages = -(-tokens // page_size) + 2
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    pages = torch.full((2, num_pages, kv_heads, page_size, head_dim), float("nan"), dtype=dtype)
    return (
        *qkv.split((heads, kv_heads, kv_heads), 1),
        rope_table(max_positions, head_dim),
        torch.randint(max_positions, (tokens,)),
        torch.randperm(num_pages * page_size)[:tokens],
        *pages,
    )
