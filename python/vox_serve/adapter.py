"""Merges a LoRA adapter into a checkpoint's tensors, one by one as they are read."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from vox_serve.adapter_tensors import Adapter, Change
from vox_serve.checkpoint import CheckpointError, TensorFiles, is_finite, refuse_not_finite
from vox_serve.model_config import CsmConfig
from vox_serve.tensor_keys import TABLES, rotary_width, tensor_keys
from vox_serve.tensor_names import TensorNames

logger = logging.getLogger("vox_serve")

PIECE_ELEMENTS = 2**26
"""Elements of a product that are computed at a time. A matrix of a layer has fewer; the last bits
of a product in pieces may differ from those of a whole one."""

_SECOND_TABLE = "the depth decoder's audio table"
"""Stands for it where a file has one audio table for both transformers."""


def merged(
    base: TensorFiles, names: TensorNames, config: CsmConfig, adapter: Adapter
) -> tuple[TensorFiles, TensorNames]:
    """A checkpoint's tensors with an adapter merged in.

    A tensor is merged when it is read: `W += scaling * (B @ A)` in float32, rounded to the dtype of
    the base's file, as peft's `merge_and_unload` does with a base of that dtype. Each audio table
    gets the changes of its own module, as if the adapter were not merged.

    Args:
        base: the base model's files.
        names: their format; the adapter's may be another one.
        config: the base model's sizes, which its tensors have.
        adapter: the adapter.

    Returns:
        The merged tensors, and their names: those of the base, but perhaps with a second audio
        table.

    Raises:
        CheckpointError: a tensor of the adapter does not fit the base model; one line names it.
    """
    changes = adapter.changes
    tables = (names.audio_table, names.depth_audio_table)
    only = next((name for name in tables if name in base), None)
    first, second = (changes.get(key) for key in TABLES[1:])
    if first != second and names.audio_table == names.depth_audio_table:
        names = replace(names, depth_audio_table=_SECOND_TABLE)
    sources = {}
    for key, name in tensor_keys(names, config).items():
        is_absent = key in TABLES[1:] and name not in base and first != second
        if key not in changes and not is_absent:
            continue
        in_base = name if name in base or only is None else only
        base.check(in_base)
        if key in changes:
            adapter.check(key, base.shape(in_base) or ())
        width = rotary_width(key, config)
        if adapter.names.interleaved_rope == names.interleaved_rope:
            width = None
        sources[name] = _Merged(base, in_base, name, adapter, key, width)
    products = sum(change.a is not None for change in changes.values())
    logger.info(
        "adapter %s: %d products, %d new tensors", adapter.folder, products, len(changes) - products
    )
    return base.with_sources(sources), names


class _Merged:
    """A tensor of the base model with an adapter's change: a `TensorSource`.

    Args:
        base: the base model's files.
        in_base: the tensor's name there.
        name: its name here.
        adapter: the adapter.
        key: of the tensor (see `tensor_keys`).
        head_dim: the head width if the base model and the adapter order the rows of a head
            differently: one has rotary pairs in adjacent rows, the other half a head apart.
    """

    def __init__(
        self,
        base: TensorFiles,
        in_base: str,
        name: str,
        adapter: Adapter,
        key: str,
        head_dim: int | None,
    ) -> None:
        source = base.source(in_base)
        self.path, self.names = source.path, [name]
        self.shapes = {name: source.shapes[in_base]}
        self.dtypes = {name: source.dtypes[in_base]}
        self._base, self._in_base, self._head_dim = base, in_base, head_dim
        self._adapter, self._change = adapter, adapter.changes.get(key, Change())
        self._is_embedding = key in TABLES
        self._is_interleaved = adapter.names.interleaved_rope

    def read(self, name: str) -> Tensor:
        tensor = self._base.read(self._in_base)
        change = self._change
        if change.value is not None:
            value = self._factor(change.value)
            tensor = self._reordered(value, not self._is_interleaved).to(tensor.dtype)
        if change.a is None or change.b is None:
            return tensor
        a, b = (self._factor(name).to(torch.float32, copy=True) for name in (change.a, change.b))
        rows = self._reordered(tensor, self._is_interleaved).clone()
        _add_product(rows, a, b, change.scaling, self._is_embedding)
        if not is_finite(rows) and is_finite(tensor):
            raise CheckpointError(
                f"{self._adapter.path}: the product of {change.b} and {change.a} overflows"
            )
        return self._reordered(rows, not self._is_interleaved)

    def _factor(self, name: str) -> Tensor:
        tensor = self._adapter.files.read(name)
        refuse_not_finite(name, tensor, self._adapter.path)
        return tensor

    def _reordered(self, tensor: Tensor, to_interleaved: bool) -> Tensor:
        """The rows of q or k with the rotary pairs of each head adjacent, or half a head apart."""
        if self._head_dim is None:
            return tensor
        split = (2, self._head_dim // 2) if to_interleaved else (self._head_dim // 2, 2)
        heads = tensor.view(-1, *split, tensor.shape[1])
        return heads.transpose(1, 2).reshape(tensor.shape)


def _add_product(out: Tensor, a: Tensor, b: Tensor, scaling: float, is_embedding: bool) -> None:
    """Add an adapter's change to a matrix, rounded as peft rounds it.

    Args:
        out: `[rows, columns]` of any float dtype; changed in place.
        a: `[rank, columns]`, or of an embedding `[rank, rows]`; float32.
        b: `[rows, rank]`, or of an embedding `[columns, rank]`; float32.
        scaling: factor of the product.
        is_embedding: the matrix is an embedding.
    """
    step = max(1, PIECE_ELEMENTS // out.shape[1])
    for start in range(0, len(out), step):
        piece = out[start : start + step]
        if is_embedding:
            piece += ((b @ a[:, start : start + step]).T * scaling).to(piece.dtype)
        else:
            piece += (b[start : start + step] @ a) * scaling
