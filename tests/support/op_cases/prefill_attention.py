"""Arguments of prefill_attention."""

import torch
from torch import Tensor

from kv_testing import paged, random_sequences, strided_heads


def offsets(lengths: list[int]) -> Tensor:
    """`cu_seqlens` of sequences with these numbers of queries."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def case(new, prefix, heads, kv_heads, head_dim, page_size, dtype=torch.float32):
    """Sequences of `new[b]` queries that follow `prefix[b]` cached keys."""
    lengths = [n + m for n, m in zip(new, prefix, strict=True)]
    k, v = (random_sequences(lengths, kv_heads, head_dim, dtype) for _ in range(2))
    k_pages, v_pages, page_table, seq_lens = paged(k, v, page_size)
    q = strided_heads(sum(new), heads, head_dim, dtype)
    return q, k_pages, v_pages, page_table, offsets(new), seq_lens, head_dim**-0.5
