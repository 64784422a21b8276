"""Split residual vector quantizer: codes to latents and back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.conv import Linear
from vox_serve.mimi.tensors import TensorReader

USAGE_FLOOR = 1e-5


class Quantizer:
    """Two chains of codebooks, semantic then acoustic, each quantizing the same latent.

    Args:
        config: the codec's sizes.
        tensors: where the weights are.
    """

    def __init__(self, config: MimiConfig, tensors: TensorReader) -> None:
        self.codebook_size, self.hidden_size = config.codebook_size, config.hidden_size
        num_semantic = config.num_semantic_quantizers
        self.chains = [
            _Chain(config, tensors, "semantic", num_semantic),
            _Chain(config, tensors, "acoustic", config.num_quantizers - num_semantic),
        ]
        self.device = self.chains[0].table.device

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the code vectors.

        Args:
            codes: `[N, B, K]` int64, K at most the number of codebooks. Out-of-range codes are
                clamped: CSM's audio vocabulary is larger than a codebook.

        Returns:
            `[N, B, C]`.
        """
        steps, batch, _ = codes.shape
        codes = codes.clamp(0, self.codebook_size - 1).flatten(0, 1)
        latent = None
        for chain in self.chains:
            part, codes = codes[:, : chain.length], codes[:, chain.length :]
            if part.shape[1]:
                latent = chain.decode(part, latent)
        return latent.view(steps, batch, self.hidden_size)

    def encode(self, latent: Tensor, num_codebooks: int) -> Tensor:
        """Args: latent `[N, B, C]`. Returns codes `[N, B, K]` int64, K = num_codebooks."""
        steps, batch, _ = latent.shape
        latent = latent.reshape(steps * batch, -1)
        codes = []
        for chain in self.chains:
            codes += chain.encode(latent, num_codebooks - len(codes))
        return torch.stack(codes, dim=-1).view(steps, batch, num_codebooks)


class _Chain:
    """Codebooks that each quantize what the ones before left over."""

    def __init__(self, config: MimiConfig, tensors: TensorReader, kind: str, length: int) -> None:
        name = f"quantizer.{kind}_residual_vector_quantizer"
        size, dim = config.codebook_size, config.codebook_dim
        self.length = length
        books = []
        for i in range(length):
            codebook = f"{name}.layers.{i}.codebook"
            usage = tensors(f"{codebook}.cluster_usage", size).clamp(min=USAGE_FLOOR)
            books.append(tensors(f"{codebook}.embed_sum", size, dim) / usage[:, None])
        self.table = torch.cat(books)  # [length * size, dim]
        self.books = self.table.split(size)
        self.starts = torch.arange(length, device=self.table.device) * size
        self.project_in = self.project_out = None
        if config.has_quantizer_projections:
            shape = dim, config.hidden_size, 1
            self.project_out = Linear(
                tensors(f"{name}.output_proj.weight", shape[1], shape[0], 1).squeeze(2)
            )
            if config.has_encoder:
                self.project_in = Linear(tensors(f"{name}.input_proj.weight", *shape).squeeze(2))

    def decode(self, codes: Tensor, add: Tensor | None) -> Tensor:
        """Args: codes `[M, k]`, 1 <= k <= length; add `[M, C]` or None. Returns `[M, C]`."""
        rows = codes + self.starts[: codes.shape[1]]
        vectors = F.embedding_bag(rows, self.table, mode="sum")
        if self.project_out is not None:
            return self.project_out(vectors, add)
        return vectors if add is None else vectors + add

    def encode(self, latent: Tensor, limit: int) -> list[Tensor]:
        """Args: latent `[M, C]`. Returns up to limit codes `[M]`, one tensor per codebook."""
        residual = latent if self.project_in is None else self.project_in(latent)
        codes = []
        for book in self.books[:limit]:
            codes.append(torch.cdist(residual[None], book[None])[0].argmin(dim=-1))
            residual = residual - book[codes[-1]]
        return codes
