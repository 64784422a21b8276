"""CSM's weights as the ops take them: stacked over layers, fused where they are used together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vox_serve.model_config import CsmConfig, TransformerConfig


@dataclass(frozen=True)
class TransformerWeights:
    """One transformer's weights, stacked over its L layers so that one op call can take them all.

    Attributes:
        attn_norm: `[L, C]`.
        qkv: `[L, (Hq + 2 Hkv) * D, C]`, q rows first, then k, then v; rotary halves split.
        o: `[L, C, Hq * D]`.
        mlp_norm: `[L, C]`.
        gate_up: `[L, 2F, C]`, gate rows first.
        down: `[L, C, F]`.
        norm: `[C]`.
    """

    attn_norm: Tensor
    qkv: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    norm: Tensor

    @classmethod
    def empty(
        cls, config: TransformerConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "TransformerWeights":
        layers, dim = config.num_layers, config.dim
        shapes = {
            "attn_norm": (layers, dim),
            "qkv": (layers, config.qkv_rows, dim),
            "o": (layers, dim, config.num_heads * config.head_dim),
            "mlp_norm": (layers, dim),
            "gate_up": (layers, 2 * config.ffn_dim, dim),
            "down": (layers, dim, config.ffn_dim),
            "norm": (dim,),
        }
        return cls(**{n: torch.empty(s, dtype=dtype, device=device) for n, s in shapes.items()})


@dataclass(frozen=True)
class CsmWeights:
    """All of CSM's weights, of one dtype and on one device.

    Attributes:
        backbone: predicts codebook 0, width C.
        depth: predicts the other codebooks, width Cd.
        text_table: `[text vocabulary, C]`.
        audio_table: `[K * V, C]`; code c of codebook k is row `k * V + c`.
        depth_audio_table: `[K * V, C]`; the same tensor object if the tables are tied.
        code0_head: `[V, C]`.
        projection: `[Cd, C]`, from the backbone's width to the depth decoder's.
        code_heads: `[K - 1, V, Cd]`; head k predicts codebook k + 1.
    """

    backbone: TransformerWeights
    depth: TransformerWeights
    text_table: Tensor
    audio_table: Tensor
    depth_audio_table: Tensor
    code0_head: Tensor
    projection: Tensor
    code_heads: Tensor

    @classmethod
    def empty(
        cls, config: CsmConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "CsmWeights":
        """Uninitialised tensors of a config's shapes, the audio tables tied."""
        codes, dim = config.audio_vocab_size, config.backbone.dim
        shapes = {
            "text_table": (config.text_vocab_size, dim),
            "audio_table": (config.num_codebooks * codes, dim),
            "code0_head": (codes, dim),
            "projection": (config.depth.dim, dim),
            "code_heads": (config.num_codebooks - 1, codes, config.depth.dim),
        }
        tensors = {n: torch.empty(s, dtype=dtype, device=device) for n, s in shapes.items()}
        return cls(
            TransformerWeights.empty(config.backbone, dtype, device),
            TransformerWeights.empty(config.depth, dtype, device),
            depth_audio_table=tensors["audio_table"],
            **tensors,
        )

    @classmethod
    def random(
        cls,
        config: CsmConfig,
        dtype: torch.dtype,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> "CsmWeights":
        """Random weights at the cost of writing them: one block of noise, tiled.

        The block is scaled per tensor so that activations keep their size; norms are ones.
        """
        generator = torch.Generator().manual_seed(seed)
        # An odd length, so that no two rows of a matrix are alike before the tiles come round.
        noise = torch.randn((1 << 20) + 7, generator=generator).to(device)
        weights = cls.empty(config, dtype, device)
        for part in (weights.backbone, weights.depth):
            for norm in (part.attn_norm, part.mlp_norm, part.norm):
                norm.fill_(1)
            for matrix in (part.qkv, part.o, part.gate_up, part.down):
                _tile(matrix, noise, matrix.shape[-1] ** -0.5)
        for table in (weights.text_table, weights.audio_table):
            _tile(table, noise, 1.0)
        for matrix in (weights.code0_head, weights.projection, weights.code_heads):
            _tile(matrix, noise, matrix.shape[-1] ** -0.5)
        return weights


def _tile(out: Tensor, noise: Tensor, scale: float) -> None:
    tile = (noise * scale).to(out.dtype)
    for part in out.view(-1).split(tile.numel()):
        part.copy_(tile[: part.numel()])
