import torch
from torch import Tensor

from voxkern.reference.prefill_attention import attend, sequence


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> Tensor:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, length in enumerate(seq_lens.tolist()):
        if length:
            k = sequence(k_pages, page_table[b], length)
            v = sequence(v_pages, page_table[b], length)
            out[b] = attend(q[b], k, v, scale)
    return out
