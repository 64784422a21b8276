"""Arguments of mimi_transformer."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes in the letters of `voxkern.ops`; a window has W keys."""

    T: int
    C: int
    L: int
    F: int
    Hq: int
    Hkv: int
    D: int
    W: int
    activation: str = "gelu"


SIZES = [
    Sizes(T=2, C=64, L=2, F=96, Hq=4, Hkv=4, D=16, W=7),
    Sizes(T=5, C=30, L=3, F=50, Hq=4, Hkv=2, D=6, W=250, activation="silu"),
    Sizes(T=1, C=17, L=1, F=9, Hq=3, Hkv=1, D=34, W=1, activation="relu"),
    Sizes(T=90, C=40, L=1, F=64, Hq=2, Hkv=2, D=20, W=100, activation="gelu_tanh"),
    Sizes(T=5, C=32, L=1, F=48, Hq=4, Hkv=2, D=64, W=250),
    Sizes(T=2, C=32, L=1, F=16, Hq=1, Hkv=1, D=64, W=300),
    Sizes(T=3, C=8, L=0, F=4, Hq=1, Hkv=1, D=2, W=3),
]


def make(s: Sizes, positions: list[int], room: int = 0) -> dict:
    """mimi_transformer's arguments, with rings `room` steps longer than needed. Slots that no query
    sees hold NaN, as do the new keys' slots."""

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape) / shape[-1] ** 0.5

    batch, qkv = len(positions), (s.Hq + 2 * s.Hkv) * s.D
    shape = batch, s.L, s.Hkv, s.W - 1 + s.T + room, s.D
    rings = [torch.full(shape, torch.nan) for _ in range(2)]
    for ring in rings:
        for row, position in zip(ring, positions, strict=True):
            for at in range(max(0, position - s.W + 1), position):
                row[:, :, at % row.shape[2]].normal_()
    return {
        "x": torch.randn(batch, s.T, s.C),
        "positions": torch.tensor(positions, dtype=torch.int64),
        "frequencies": 1 / 100 ** (torch.arange(s.D // 2) / (s.D // 2)),
        "norms": torch.randn(s.L, 4, s.C),
        "qkv": matrix(s.L, qkv, s.C),
        "qkv_bias": torch.randn(s.L, qkv),
        "o": matrix(s.L, s.C, s.Hq * s.D),
        "o_bias": torch.randn(s.L, s.C),
        "up": matrix(s.L, s.F, s.C),
        "down": matrix(s.L, s.C, s.F),
        "eps": 1e-3,
        "activation": s.activation,
        "keys": rings[0],
        "values": rings[1],
        "window": s.W,
    }
