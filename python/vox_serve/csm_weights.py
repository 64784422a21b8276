"""CSM's weights as the ops take them: stacked over layers, and fused if used together."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from vox_serve.model_config import CsmConfig, TransformerConfig
from voxkern import ops
from voxkern.quantize import BLOCK_ROWS, GROUP, format_of, pack, packed_shape

MATRICES = ("qkv", "o", "gate_up", "down")
"""The matrices of a transformer's layers that may be packed."""

PACKINGS: dict[str, dict[str, str]] = {
    "none": {},
    "int8": {"backbone": "int8", "depth": "int8", "code_heads": "int8"},
    "int4": {"backbone": "int4", "depth": "int4", "code_heads": "int8"},
}
"""The weights packed by each `--quantize` value, and their format in `voxkern.quantize`. "backbone"
and "depth" are the matrices of their layers. All other weights stay plain: embeddings, norms, the
head of codebook 0, the projection."""

_CHUNK = 2048
"""Rows of a table projected at a time, to need little memory beyond the result."""


@dataclass(frozen=True)
class TransformerWeights:
    """One transformer's weights, stacked over its L layers so that one op call can take them all.

    The `MATRICES` may be packed; the shapes below are those of plain ones.

    Attributes:
        attn_norm: `[L, C]`.
        qkv: `[L, (Hq + 2 Hkv) * D, C]`, q rows first, then k, then v; half-split rotary pairs.
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

    @staticmethod
    def shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
        """Plain (unpacked) shapes of a config's tensors, by name."""
        layers, dim = config.num_layers, config.dim
        return {
            "attn_norm": (layers, dim),
            "qkv": (layers, config.qkv_rows, dim),
            "o": (layers, dim, config.num_heads * config.head_dim),
            "mlp_norm": (layers, dim),
            "gate_up": (layers, 2 * config.ffn_dim, dim),
            "down": (layers, dim, config.ffn_dim),
            "norm": (dim,),
        }


@dataclass(frozen=True)
class CsmWeights:
    """All of CSM's weights, on one device and of one dtype, except the packed ones.

    Attributes:
        backbone: predicts codebook 0, width C.
        depth: predicts the other codebooks, width Cd.
        text_table: `[text vocabulary, C]`.
        audio_table: `[K * V, C]`; code c of codebook k is row `k * V + c`.
        depth_audio_rows: `[K * V, Cd]`, the depth decoder's audio table (which may differ from the
            backbone's) after the projection.
        code0_head: `[V, C]`.
        projection: `[Cd, C]`, from the backbone's width to the depth decoder's.
        code_heads: `[K - 1, V, Cd]`; head k predicts codebook k + 1; may be packed.
    """

    backbone: TransformerWeights
    depth: TransformerWeights
    text_table: Tensor
    audio_table: Tensor
    depth_audio_rows: Tensor
    code0_head: Tensor
    projection: Tensor
    code_heads: Tensor

    @staticmethod
    def shapes(config: CsmConfig) -> dict[str, tuple[int, ...]]:
        """Plain (unpacked) shapes of a config's tensors outside the layers."""
        codes, dim = config.audio_vocab_size, config.backbone.dim
        return {
            "text_table": (config.text_vocab_size, dim),
            "audio_table": (config.num_codebooks * codes, dim),
            "depth_audio_rows": (config.num_codebooks * codes, config.depth.dim),
            "code0_head": (codes, dim),
            "projection": (config.depth.dim, dim),
            "code_heads": (config.num_codebooks - 1, codes, config.depth.dim),
        }

    @classmethod
    def empty(
        cls,
        config: CsmConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        quantize: str = "none",
    ) -> "CsmWeights":
        """Uninitialised tensors in a config's shapes.

        Raises:
            ValueError: a matrix that `quantize`, a key of `PACKINGS`, packs has unsuitable sizes.
        """
        packing = PACKINGS[quantize]

        def tensor(name: str, shape: tuple[int, ...], format: str | None) -> Tensor:
            if format is None:
                return torch.empty(shape, dtype=dtype, device=device)
            rows, columns = shape[-2:]
            # Only the ops that use the heads know how many rows of the last block are valid.
            if columns % GROUP or (rows % BLOCK_ROWS and name != "code_heads"):
                raise ValueError(
                    f"quantize {quantize} does not fit this model: {name} is {rows} x {columns}, "
                    f"but packed matrices need a multiple of {GROUP} columns and a multiple of "
                    f"{BLOCK_ROWS} rows"
                )
            packed_dtype = torch.int8 if format == "int8" else torch.uint8
            return torch.empty(packed_shape(shape, format), dtype=packed_dtype, device=device)

        def transformer(name: str, part: TransformerConfig) -> TransformerWeights:
            return TransformerWeights(
                **{
                    key: tensor(f"{name}.{key}", shape, packing.get(name))
                    if key in MATRICES
                    else tensor(key, shape, None)
                    for key, shape in TransformerWeights.shapes(part).items()
                }
            )

        tensors = {n: tensor(n, shape, packing.get(n)) for n, shape in cls.shapes(config).items()}
        return cls(
            transformer("backbone", config.backbone),
            transformer("depth", config.depth),
            **tensors,
        )

    def named(self) -> dict[str, Tensor]:
        """All tensors by attribute name, such as `text_table` and `depth.qkv`."""
        return _named(self, "")

    def with_named(self, tensors: Mapping[str, Tensor]) -> "CsmWeights":
        """New weights whose `named()` is `tensors`.

        Raises:
            ValueError: names, shapes or dtypes differ from those of these weights.
        """
        for name, tensor in self.named().items():
            got = tensors.get(name)
            if got is None or (got.shape, got.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{name}: expected {tensor.dtype} {list(tensor.shape)}")
        return _with_named(self, tensors, "")

    @classmethod
    def random(
        cls,
        config: CsmConfig,
        dtype: torch.dtype,
        seed: int = 0,
        device: torch.device | str = "cpu",
        quantize: str = "none",
    ) -> "CsmWeights":
        """Random weights, as fast as memory can be written: one block of noise, tiled.

        The block is scaled per tensor to keep the size of activations; norms are ones. Both
        transformers share one audio table.
        """
        generator = torch.Generator().manual_seed(seed)
        # An odd length, so that the rows of a matrix differ until the tiles repeat.
        noise = torch.randn((1 << 20) + 7, generator=generator, device="cpu").to(device)
        weights = cls.empty(config, dtype, device, quantize)
        for part, sizes in ((weights.backbone, config.backbone), (weights.depth, config.depth)):
            for norm in (part.attn_norm, part.mlp_norm, part.norm):
                norm.fill_(1)
            for name, shape in TransformerWeights.shapes(sizes).items():
                if name in MATRICES:
                    _tile(getattr(part, name), noise, shape[-1])
        for name, shape in cls.shapes(config).items():
            table = name in ("text_table", "audio_table")
            _tile(getattr(weights, name), noise, 1 if table else shape[-1])
        weights.project_audio_rows(weights.audio_table)
        return weights

    def project_audio_rows(self, table: Tensor) -> None:
        """Fill `depth_audio_rows`: bit for bit the projection that each step would compute.

        Args:
            table: `[K * V, C]`, the depth decoder's audio table, on any device, of any float dtype.
        """
        for rows, out in zip(table.split(_CHUNK), self.depth_audio_rows.split(_CHUNK), strict=True):
            out.copy_(ops.linear(rows.to(out), self.projection))


Weights = TypeVar("Weights", CsmWeights, TransformerWeights)


def _named(weights: CsmWeights | TransformerWeights, prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for field in fields(weights):
        name, value = f"{prefix}{field.name}", getattr(weights, field.name)
        tensors |= {name: value} if isinstance(value, Tensor) else _named(value, f"{name}.")
    return tensors


def _with_named(weights: Weights, tensors: Mapping[str, Tensor], prefix: str) -> Weights:
    values: dict[str, Any] = {}
    for field in fields(weights):
        name, value = f"{prefix}{field.name}", getattr(weights, field.name)
        is_tensor = isinstance(value, Tensor)
        values[field.name] = tensors[name] if is_tensor else _with_named(value, tensors, f"{name}.")
    return type(weights)(**values)


def _tile(out: Tensor, noise: Tensor, fan_in: int) -> None:
    tile = noise * fan_in**-0.5
    format = format_of(out)
    if format == "none":
        tile = tile.to(out.dtype)
    else:
        rows = tile.numel() // fan_in // BLOCK_ROWS * BLOCK_ROWS
        tile = pack(tile[: rows * fan_in].view(rows, fan_in), format).view(-1)
    for part in out.view(-1).split(tile.numel()):
        part.copy_(tile[: part.numel()])
