"""Muon (Jordan 2024) in float32: torch.optim.Muon computes in bfloat16, which takes about 20
times as long on a CPU without it, more than the rest of a training step."""

import math

import torch

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic iteration, as in torch.optim.Muon
ITERATIONS = 5


def orthogonal(matrix):
    """[M, N] -> the nearest matrix with singular values of about 1, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """For matrices; `lr` grows with the square root of rows over columns, if those are more."""

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - MOMENTUM)
                update = orthogonal(p.grad.lerp(buffer, MOMENTUM))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))
