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
        new = slice(bounds[b], bounds[b + 1])
        k = sequence(k_pages, page_table[b], length)
        v = sequence(v_pages, page_table[b], length)
        out[new] = attend(q[new], k, v, scale).to(q.dtype)
    return out


def sequence(pages: Tensor, page_row: Tensor, length: int) -> Tensor:
    """Gather one sequence's keys or values `[length, Hkv, D]` from its pages."""
    page_size = pages.shape[2]
    used = page_row[: -(-length // page_size)].long()
    return pages[used].transpose(1, 2).flatten(0, 1)[:length]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last `len(q)` of `len(k)` positions, `[.., heads, D]`, float32."""
    group = q.shape[1] // k.shape[1]
    k = k.float().repeat_interleave(group, 1)
    v = v.float().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    query_at = torch.arange(len(k) - len(q), len(k), device=q.device)
    key_at = torch.arange(len(k), device=q.device)
    scores.masked_fill_(key_at > query_at[:, None], float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
