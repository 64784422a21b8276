"""Arguments of linear."""

import torch


def make(lead, features, rows, dtype):
    """x and a weight scaled to keep results near 1."""
    weight = torch.randn(rows, features) / max(features, 1) ** 0.5
    return torch.randn(*lead, features).to(dtype), weight.to(dtype)
