"""Arguments of decode_depth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from voxkern.quantize import pack


@dataclass(frozen=True)
class Sizes:
    """Sizes of a depth decoder, in the letters of `voxkern.ops`."""

    K: int
    V: int
    L: int
    Cb: int
    C: int
    F: int
    Hq: int
    Hkv: int
    D: int


SIZES = [
    Sizes(K=32, V=35, L=2, Cb=48, C=40, F=72, Hq=4, Hkv=2, D=16),
    Sizes(K=5, V=2051, L=1, Cb=33, C=64, F=50, Hq=2, Hkv=1, D=6),
    Sizes(K=2, V=7, L=3, Cb=16, C=9, F=11, Hq=3, Hkv=3, D=34),
    Sizes(K=4, V=1, L=0, Cb=8, C=8, F=4, Hq=1, Hkv=1, D=2),
    Sizes(K=9, V=35, L=2, Cb=40, C=72, F=40, Hq=5, Hkv=1, D=32),
    Sizes(K=33, V=35, L=1, Cb=40, C=40, F=40, Hq=2, Hkv=2, D=64),
    Sizes(K=6, V=35, L=1, Cb=40, C=40, F=40, Hq=4, Hkv=2, D=128),
]
# Not all multiples of 16: 41 codes, and 108 rows of qkv, do not fill the last block.
PACKED_SIZES = [
    Sizes(K=32, V=41, L=2, Cb=64, C=96, F=160, Hq=4, Hkv=2, D=16),
    Sizes(K=6, V=33, L=1, Cb=32, C=32, F=32, Hq=16, Hkv=1, D=6),
]
# Sizes that the persistent kernel supports: columns are whole 16-byte vectors, or packed.
PERSISTENT_SIZES = [
    Sizes(K=4, V=35, L=2, Cb=40, C=72, F=104, Hq=5, Hkv=1, D=64),
    Sizes(K=3, V=35, L=1, Cb=24, C=40, F=48, Hq=2, Hkv=2, D=128),
]
PACKED_PERSISTENT_SIZES = [
    Sizes(K=3, V=35, L=1, Cb=64, C=96, F=1056, Hq=2, Hkv=1, D=64),
    Sizes(K=3, V=35, L=2, Cb=32, C=32, F=96, Hq=1, Hkv=1, D=128),
]
MATRICES = ("projection", "qkv", "o", "gate_up", "down", "heads")
PACKINGS = [
    dict.fromkeys(MATRICES, "int8"),
    dict.fromkeys(MATRICES, "int4"),
    {"projection": "int8", "gate_up": "int4", "heads": "int8"},
    {"qkv": "int4", "o": "int8", "down": "int4"},
]
WEIGHTS = (
    *("audio_rows", "projection", "attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down"),
    *("norm", "heads"),
)


def make(sizes: Sizes, dtype: torch.dtype, rows: int = 3) -> dict:
    """decode_depth's arguments. Logits have a standard deviation of about 5: choices are clear."""
    s = sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape) / shape[-1] ** 0.5

    arguments = {
        "hidden": torch.randn(rows, s.Cb),
        "code0": torch.randint(s.V, (rows,)),
        "audio_rows": torch.randn(s.K * s.V, s.C),
        "projection": normal(s.C, s.Cb),
        "attn_norm": 1 + 0.1 * torch.randn(s.L, s.C),
        "qkv": 2 * normal(s.L, (s.Hq + 2 * s.Hkv) * s.D, s.C),
        "o": normal(s.L, s.C, s.Hq * s.D),
        "mlp_norm": 1 + 0.1 * torch.randn(s.L, s.C),
        "gate_up": normal(s.L, 2 * s.F, s.C),
        "down": normal(s.L, s.C, s.F),
        "norm": 1 + 0.1 * torch.randn(s.C),
        "heads": 5 * normal(s.K - 1, s.V, s.C),
    }
    for name in ("hidden", *WEIGHTS):
        arguments[name] = arguments[name].to(dtype)
    angles = torch.arange(s.K + 1)[:, None] / 100 ** (torch.arange(s.D // 2) / (s.D // 2))
    return arguments | {
        "rope_table": torch.cat((angles.cos(), angles.sin()), -1),
        "num_heads": s.Hq,
        "num_kv_heads": s.Hkv,
        "eps": 1e-5,
        "temperature": torch.tensor([0.0, 0.9, 2.0]).repeat(rows)[:rows],
        "top_k": torch.tensor([0, 50, 0, 2], dtype=torch.int32).repeat(rows)[:rows],
        "top_p": torch.tensor([1.0, 1.0, 0.8, 1.0, 0.9]).repeat(rows)[:rows],
        "min_p": torch.tensor([0.0, 0.0, 0.01]).repeat(rows)[:rows],
        "seeds": torch.randint(-(2**62), 2**62, (rows,)),
        "frames": torch.randint(2**40, (rows,)),
    }


def packed(arguments: dict, packing: dict[str, str]) -> dict:
    return arguments | {n: pack(arguments[n], format) for n, format in packing.items()}
