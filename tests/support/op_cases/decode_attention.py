"""Arguments of decode_attention."""

import torch

from kv_testing import paged, random_sequences, strided_heads


def case(lengths, heads, kv_heads, head_dim, page_size, dtype=torch.float32):
    k, v = (random_sequences(lengths, kv_heads, head_dim, dtype) for _ in range(2))
    q = strided_heads(len(lengths), heads, head_dim, dtype)
    return q, *paged(k, v, page_size), head_dim**-0.5
