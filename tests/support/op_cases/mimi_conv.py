"""Arguments of mimi_conv."""

from dataclasses import dataclass

import torch

from voxkern.quantize import block_rows


@dataclass(frozen=True)
class Sizes:
    """Sizes in the letters of `voxkern.ops`; J taps."""

    B: int
    T: int
    C: int
    J: int
    N: int
    dilation: int = 1


SIZES = [
    Sizes(B=1, T=2, C=96, J=7, N=64),
    Sizes(B=2, T=5, C=36, J=3, N=21, dilation=2),
    Sizes(B=3, T=50, C=64, J=3, N=33),
    Sizes(B=1, T=300, C=18, J=2, N=1),
    Sizes(B=1, T=90, C=32, J=1, N=130),
    Sizes(B=2, T=1, C=2, J=2, N=7, dilation=5),
    Sizes(B=4, T=40, C=6, J=4, N=16, dilation=9),
    Sizes(B=1, T=7, C=700, J=3, N=17),
    Sizes(B=2, T=0, C=8, J=3, N=5),
    Sizes(B=0, T=3, C=8, J=3, N=5),
    Sizes(B=2, T=3, C=8, J=3, N=0),
]


def make(s: Sizes, dtype=torch.float32, add=True, elu=True) -> dict:
    """mimi_conv's arguments, with a weight scaled to keep results near 1."""
    weight = torch.randn(s.N, s.J * s.C) / (s.J * s.C) ** 0.5
    return {
        "x": torch.randn(s.B, s.T, s.C),
        "past": torch.randn(s.B, (s.J - 1) * s.dilation, s.C),
        "weight": block_rows(weight.to(dtype)),
        "bias": torch.randn(s.N),
        "add": torch.randn(s.B, s.T, s.N) if add else None,
        "dilation": s.dilation,
        "elu": elu,
    }
