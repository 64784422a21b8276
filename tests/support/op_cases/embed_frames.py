"""Arguments of embed_frames."""

import torch


def case(tokens, codebooks, vocab_size, text_vocab_size, dim, dtype=torch.float32):
    """embed_frames' arguments; every masked entry holds an id outside both tables."""
    frames = torch.randint(vocab_size, (tokens, codebooks + 1))
    frames[:, -1] = torch.randint(text_vocab_size, (tokens,))
    mask = torch.rand(tokens, codebooks + 1) < 0.7
    frames[~mask] = torch.tensor([-1, 2**62, -(2**63), vocab_size + text_vocab_size]).repeat(
        frames.numel()
    )[: int((~mask).sum())]
    return (
        frames,
        mask,
        torch.randn(codebooks * vocab_size, dim).to(dtype),
        torch.randn(text_vocab_size, dim).to(dtype),
    )
