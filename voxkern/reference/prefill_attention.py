import torch
from torch import Tensor


def prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    bounds = cu_seqlens.tolist()
    for b, length in enumerate(seq_lens.tolist()):
        k, v = (sequence(pages, page_table[b], length) for pages in (k_pages, v_pages))
        for token in range(bounds[b], bounds[b + 1]):
            seen = length - bounds[b + 1] + token + 1
            out[token] = attend(q[token], k[:seen], v[:seen], scale)
    return out


def sequence(pages: Tensor, page_row: Tensor, length: int) -> Tensor:
    """Gather one sequence's keys or values `[length, Hkv, D]` from its pages."""
    page_size = pages.shape[2]
    used = page_row[: -(-length // page_size)].long()
    return pages[used].transpose(1, 2).flatten(0, 1)[:length]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of one query `[Hq, D]` to all of k and v `[keys, Hkv, D]`, float32.

    Each query is a call of its own, with a copy that starts at an aligned address: the order of
    torch's sums depends on the sizes and alignment of a call's tensors, and must not depend on the
    other queries of a prompt.
    """
    queries = q.float().clone().view(k.shape[1], -1, q.shape[1])  # [Hkv, Hq / Hkv, D]
    scores = torch.einsum("hgd,khd->hgk", queries, k.float()) * scale
    return torch.einsum("hgk,khd->hgd", scores.softmax(-1), v.float()).reshape(q.shape)
