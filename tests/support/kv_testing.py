"""Paged KV caches for the attention tests: pages in random order, unused entries NaN or garbage."""

import torch
from torch import Tensor

GARBAGE_PAGE = 2**31 - 1


def paged(k: list[Tensor], v: list[Tensor], page_size: int, spare_pages: int = 3) -> tuple:
    """`k_pages, v_pages, page_table, seq_lens` that hold sequences `[length, Hkv, D]`.

    Page numbers are a random permutation. Unused pages and the slots past a sequence's end hold
    NaN; table entries past its end hold a page number outside any pool.
    """
    lengths = [len(sequence) for sequence in k]
    used = [-(-length // page_size) for length in lengths]
    num_pages = sum(used) + spare_pages
    order = torch.randperm(num_pages).tolist()
    page_table = torch.full((len(k), max(used, default=0) + 1), GARBAGE_PAGE, dtype=torch.int32)
    heads, head_dim = k[0].shape[1:]
    pages = torch.full((2, num_pages, heads, page_size, head_dim), float("nan"), dtype=k[0].dtype)
    for b, length in enumerate(lengths):
        for m in range(used[b]):
            page = page_table[b, m] = order.pop()
            part = slice(m * page_size, min((m + 1) * page_size, length))
            for side, sequences in enumerate((k, v)):
                rows = sequences[b][part].transpose(0, 1)
                pages[side, page, :, : rows.shape[1]] = rows
    return *pages, page_table, torch.tensor(lengths, dtype=torch.int32)


def random_sequences(
    lengths: list[int], heads: int, head_dim: int, dtype=torch.float32
) -> list[Tensor]:
    return [torch.randn(length, heads, head_dim).to(dtype) for length in lengths]


def strided_heads(tokens: int, heads: int, head_dim: int, dtype=torch.float32) -> Tensor:
    """`[tokens, heads, head_dim]`, a view of a wider projection."""
    return torch.randn(tokens, heads + 3, head_dim).to(dtype)[:, 1 : heads + 1]
