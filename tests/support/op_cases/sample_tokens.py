"""Arguments of sample_tokens."""

import torch
from torch import Tensor


def arguments(
    logits: Tensor,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    history=None,
    seeds=None,
    frames=0,
    codebook=0,
) -> tuple:
    """sample_tokens' arguments; a scalar applies to every row."""
    rows = logits.shape[0]

    def column(value, dtype: torch.dtype) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full((rows,), value, dtype=dtype)

    return (
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(repetition_penalty, torch.float32),
        torch.empty(rows, 0, dtype=torch.int64) if history is None else history,
        torch.arange(rows) if seeds is None else column(seeds, torch.int64),
        column(frames, torch.int64),
        codebook,
    )


def mixed_parameters(rows: int, vocab_size: int) -> dict:
    def choose(*values, dtype=torch.float32):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,))]

    return {
        "temperature": choose(0.0, 0.3, 0.9, 1.0, 1.7),
        "top_k": choose(0, 1, 7, 50, vocab_size, 5000, dtype=torch.int32),
        "top_p": choose(1.0, 0.99, 0.9, 0.5, 0.01),
        "min_p": choose(0.0, 0.01, 0.1, 1.0),
        "repetition_penalty": choose(1.0, 1.3, 0.7),
        "history": torch.randint(-1, vocab_size, (rows, 16)),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (rows,)),
        "frames": torch.randint(0, 2**40, (rows,)),
    }
