"""Arguments of mimi_convs."""

import torch

from voxkern.quantize import block_rows

# (input value, added value, dilation, ELU, block in, block out, replicate), (width in, out, taps).
CHAIN = [
    ((0, -1, 1, 0, 2, 1, 1), (12, 20, 3)),
    ((1, -1, 3, 1, 1, 1, 1), (20, 8, 2)),
    ((2, 1, 1, 1, 1, 1, 0), (8, 20, 1)),
    ((3, -1, 1, 1, 1, 5, 0), (20, 30, 2)),
    ((4, -1, 2, 0, 1, 1, 1), (6, 1, 4)),
]


def make(batch: int, blocks: int, dtype=torch.float32) -> dict:
    """mimi_convs' arguments; every other stream is new."""
    past, weights, biases = [], [], []
    for (_, _, dilation, *_), (width, out, taps) in CHAIN:
        weight = torch.randn(out, taps * width) / (taps * width) ** 0.5
        weights.append(block_rows(weight.to(dtype)))
        biases.append(torch.randn(out))
        past.append(torch.randn(batch, (taps - 1) * dilation, width))
    return {
        "x": torch.randn(batch, 2 * blocks, 6),
        "fresh": torch.arange(batch) % 2 == 0,
        "past": past,
        "weights": weights,
        "biases": biases,
        "plan": [number for step, _ in CHAIN for number in step],
    }
