"""Arguments of decode_backbone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_testing import paged, random_sequences
from voxkern.quantize import pack


@dataclass(frozen=True)
class Sizes:
    """Sizes of a backbone with pages of S tokens, in the letters of `voxkern.ops`."""

    L: int
    C: int
    F: int
    Hq: int
    Hkv: int
    D: int
    S: int


SIZES = [
    Sizes(L=2, C=40, F=72, Hq=4, Hkv=2, D=16, S=16),
    Sizes(L=3, C=64, F=50, Hq=16, Hkv=4, D=32, S=5),
    Sizes(L=1, C=9, F=11, Hq=3, Hkv=3, D=34, S=1),
    Sizes(L=0, C=8, F=4, Hq=1, Hkv=1, D=2, S=3),
]
MATRICES = ("qkv", "o", "gate_up", "down")
PACKINGS = [
    dict.fromkeys(MATRICES, "int8"),
    dict.fromkeys(MATRICES, "int4"),
    {"qkv": "int4", "down": "int8"},
    {"o": "int8", "gate_up": "int4"},
]
# qkv has 96 rows, and 108, which do not fill the last block.
PACKED_SIZES = [
    Sizes(L=2, C=96, F=160, Hq=4, Hkv=2, D=16, S=16),
    Sizes(L=1, C=32, F=32, Hq=16, Hkv=1, D=6, S=5),
]


def make(sizes: Sizes, dtype: torch.dtype, lengths: list[int]) -> dict:
    """decode_backbone's arguments; the new tokens' slots hold NaN, as do all unused ones."""
    s, rows = sizes, len(lengths)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    def norm(*shape: int) -> Tensor:
        return (1 + 0.1 * torch.randn(shape)).to(dtype)

    # A page number means the same page in all layers, so all layers' heads are paged together.
    heads = max(s.L, 1) * s.Hkv
    k, v = (random_sequences(lengths, heads, s.D, dtype) for _ in range(2))
    for sequence in (*k, *v):
        sequence[-1:] = torch.nan
    *pages, page_table, seq_lens = paged(k, v, s.S)
    k_pages, v_pages = (
        p.unflatten(1, (-1, s.Hkv)).transpose(0, 1)[: s.L].contiguous() for p in pages
    )
    positions = (seq_lens.long() - 1).clamp(min=0)
    page = page_table.gather(1, (positions // s.S)[:, None])[:, 0].long()
    angles = torch.arange(max(lengths) + 3)[:, None] / 100 ** (torch.arange(s.D // 2) / (s.D // 2))
    return {
        "x": torch.randn(rows, s.C).to(dtype),
        "attn_norm": norm(s.L, s.C),
        "qkv": 2 * normal(s.L, (s.Hq + 2 * s.Hkv) * s.D, s.C),
        "o": normal(s.L, s.C, s.Hq * s.D),
        "mlp_norm": norm(s.L, s.C),
        "gate_up": normal(s.L, 2 * s.F, s.C),
        "down": normal(s.L, s.C, s.F),
        "norm": norm(s.C),
        "rope_table": torch.cat((angles.cos(), angles.sin()), -1),
        "num_heads": s.Hq,
        "num_kv_heads": s.Hkv,
        "eps": 1e-5,
        "positions": positions,
        "slots": torch.where(seq_lens > 0, page * s.S + positions % s.S, -1),
        "k_pages": k_pages,
        "v_pages": v_pages,
        "page_table": page_table,
        "seq_lens": seq_lens,
    }


def packed(arguments: dict, packing: dict[str, str]) -> dict:
    return arguments | {n: pack(arguments[n], format) for n, format in packing.items()}
