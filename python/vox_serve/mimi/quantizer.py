"""Split residual vector quantizer: codes to latents and back."""

import torch
from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.tensors import TensorReader
from voxkern import ops

USAGE_FLOOR = 1e-5


class Quantizer:
    """Two chains of codebooks, semantic then acoustic, which both quantize the same latent.

    Args:
        config: the codec's sizes.
        tensors: reader of the weights.
    """

    def __init__(self, config: MimiConfig, tensors: TensorReader) -> None:
        self.codebook_size, self.hidden_size = config.codebook_size, config.hidden_size
        self.num_semantic = config.num_semantic_quantizers
        semantic = _Chain(config, tensors, "semantic", self.num_semantic)
        acoustic = _Chain(config, tensors, "acoustic", config.num_quantizers - self.num_semantic)
        self.chains = [semantic, acoustic]
        self.table = torch.cat([*semantic.books, *acoustic.books])  # [codebooks * size, dim]
        books = self.table.split(config.codebook_size)
        semantic.books, acoustic.books = books[: self.num_semantic], books[self.num_semantic :]
        self.device = self.table.device
        self.project_out: Tensor | None = None
        if config.has_quantizer_projections:
            # Both chains' output projections side by side: one product projects and adds both sums.
            outs = [chain.project_out for chain in self.chains if chain.project_out is not None]
            self.project_out = torch.cat(outs, 1)
        self.mask = self._sums_mask(len(books))

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the code vectors of each frame, and project the sums to latents if the codec does.

        Args:
            codes: `[B, N, K]` int64, K at most the number of codebooks. Out-of-range codes are
                clamped: CSM's audio vocabulary is larger than a codebook.

        Returns:
            `[B, N, C]`.
        """
        batch, frames, width = codes.shape
        mask = self.mask if width + 1 == self.mask.shape[1] else self._sums_mask(width)
        # embed_frames expects a text column after the codes: it holds zeros and is masked out. The
        # codes of a frame are repeated for each sum.
        rows = codes.new_zeros(batch * frames, *mask.shape)
        rows[..., :-1] = codes.reshape(-1, 1, width)
        rows.clamp_(0, self.codebook_size - 1)
        mask = mask.expand_as(rows).flatten(0, 1)
        table = self.table[: width * self.codebook_size]
        sums = ops.embed_frames(rows.flatten(0, 1), mask, table, self.table[:1])
        sums = sums.view(batch, frames, -1)
        return sums if self.project_out is None else ops.linear(sums, self.project_out)

    def _sums_mask(self, width: int) -> Tensor:
        """`[sums, width + 1]` bool: a sum per chain if there are projections, else a single one."""
        columns = torch.arange(width + 1, device=self.device)
        if self.project_out is None:
            return (columns < width)[None]
        semantic = columns < self.num_semantic
        return torch.stack((semantic, ~semantic)) & (columns < width)

    def encode(self, latent: Tensor, num_codebooks: int) -> Tensor:
        """Quantize latent `[B, N, C]`; returns codes `[B, N, K]` int64, K = num_codebooks."""
        batch, frames, _ = latent.shape
        latent = latent.reshape(batch * frames, -1)
        codes: list[Tensor] = []
        for chain in self.chains:
            codes += chain.encode(latent, num_codebooks - len(codes))
        return torch.stack(codes, dim=-1).view(batch, frames, num_codebooks)


class _Chain:
    """A chain of codebooks; each quantizes the residual of the previous ones."""

    def __init__(self, config: MimiConfig, tensors: TensorReader, kind: str, length: int) -> None:
        name = f"quantizer.{kind}_residual_vector_quantizer"
        size, dim = config.codebook_size, config.codebook_dim
        # A checkpoint stores the running sum of the latents assigned to each code, and their count;
        # the code's vector is their mean.
        self.books = []
        for i in range(length):
            codebook = f"{name}.layers.{i}.codebook"
            usage = tensors(f"{codebook}.cluster_usage", size).clamp(min=USAGE_FLOOR)
            self.books.append(tensors(f"{codebook}.embed_sum", size, dim) / usage[:, None])
        self.project_in: Tensor | None = None
        self.project_out: Tensor | None = None
        if config.has_quantizer_projections:
            shape = dim, config.hidden_size, 1
            self.project_out = tensors(f"{name}.output_proj.weight", shape[1], dim, 1).squeeze(2)
            if config.has_encoder:
                self.project_in = tensors(f"{name}.input_proj.weight", *shape).squeeze(2)

    def encode(self, latent: Tensor, limit: int) -> list[Tensor]:
        """Quantize latent `[M, C]`; returns codes `[M]` of each of the first `limit` codebooks."""
        residual = latent if self.project_in is None else ops.linear(latent, self.project_in)
        codes = []
        for book in self.books[:limit]:
            codes.append(torch.cdist(residual[None], book[None])[0].argmin(dim=-1))
            residual = residual - book[codes[-1]]
        return codes
