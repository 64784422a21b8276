"""Loads a checkpoint folder of either format: stacked tensors of the model, and the codec."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vox_serve.adapter import merged
from vox_serve.adapter_config import CONFIG_FILE
from vox_serve.adapter_tensors import Adapter
from vox_serve.checkpoint import (
    CODEC_PREFIX,
    CheckpointError,
    TensorFiles,
    find_codec,
    find_weights,
    is_finite,
    refuse_not_finite,
)
from vox_serve.checkpoint_layouts import csm_tensors, log_unused
from vox_serve.checkpoint_settings import settings_files
from vox_serve.checkpoint_sizes import check_sizes
from vox_serve.csm_weights import CsmWeights, TransformerWeights
from vox_serve.gguf_rounding import rounding_line, second_rounding
from vox_serve.gguf_tensors import GgufTensors, decoder_versions
from vox_serve.hub import resolve_codec
from vox_serve.mimi import Mimi, load_mimi, mimi_from_checkpoint
from vox_serve.model_config import CsmConfig, TransformerConfig
from vox_serve.model_files import folder_of, gguf_of, model_settings, naming_settings
from vox_serve.tensor_names import TensorNames
from vox_serve.weight_cache import WeightCache, folder_stamps
from voxkern.backend import backend_for
from voxkern.quantize import LAYOUT_VERSION, format_of, pack

logger = logging.getLogger("vox_serve")

STACKING_VERSION = 2
"""Version of the code that turns a checkpoint's tensors into `CsmWeights`. Increase it with every
change, so that old caches are rebuilt. From 2 on, all tensors were finite when they were packed; a
cache is not checked again, since its digest protects it."""


_DECODED_ROWS = 2048
"""Rows of a GGUF file's matrix that are in memory as float32 at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint folder.

    Attributes:
        folder: path of the folder.
        settings: config.json, parsed.
        config: the model's sizes.
        weights: weights of the two transformers.
        codec_tensors: the codec's tensors by transformers' Mimi names, float32 on the CPU; None
            if the checkpoint contains no codec.
        codec_config: transformers' settings of the codec; None if config.json has none.
    """

    folder: Path
    settings: dict[str, Any]
    config: CsmConfig
    weights: CsmWeights
    codec_tensors: dict[str, Tensor] | None
    codec_config: dict[str, Any] | None


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose settings and headers were read and fit each other, but no values yet.

    Attributes:
        settings, config: see `Checkpoint`.
        paths: files of the weights.
        files, names: their tensors, and the format of their names.
        lora: the adapter that will be merged; None without one.
        stamps: of the files in the folders, from before any was read.
    """

    settings: dict[str, Any]
    config: CsmConfig
    paths: list[Path]
    files: TensorFiles
    names: TensorNames
    lora: Adapter | None
    stamps: dict[Path, list[int]]


def open_checkpoint(
    path: Path, allow_pickle: bool = False, adapter: Path | None = None
) -> OpenCheckpoint:
    """Read all of a checkpoint but the values (see `load_checkpoint`)."""
    folder, gguf = folder_of(path), gguf_of(path)
    if gguf is None and not path.is_dir():
        raise CheckpointError(f"{path} is not a folder")
    stamps = {**folder_stamps(folder), **(folder_stamps(adapter) if adapter else {})}
    settings = model_settings(path, allow_pickle)
    with naming_settings(path):
        config = CsmConfig.from_json(settings)
    paths = [gguf] if gguf else find_weights(folder, settings, allow_pickle)
    for below in {file.parent for file in paths} - {folder}:
        stamps |= folder_stamps(below)
    lora = Adapter(adapter, config, allow_pickle) if adapter else None
    files, names = csm_tensors(TensorFiles(paths), settings)
    with naming_settings(path):
        check_sizes(files, names, config, settings)
    return OpenCheckpoint(settings, config, paths, files, names, lora, stamps)


def load_checkpoint(
    path: Path | str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
    quantize: str = "none",
    cache_folders: Sequence[Path] = (),
    adapter: Path | None = None,
) -> Checkpoint:
    """Load a checkpoint in transformers' format or the original's, in safetensors or GGUF.

    The names of the tensors identify the format. Tensors are read one by one into their final place
    and packed one layer's matrix at a time, so the peak memory is little more than the weights.

    Args:
        path: the folder, or a GGUF file.
        dtype: dtype of the weights in memory, whatever the dtype in the files.
        device: device of the weights.
        allow_pickle: read ckpt.pt (plain tensors only) if there is no safetensors file.
        quantize: which matrices are packed, a key of `csm_weights.PACKINGS`.
        cache_folders: candidate folders for a cache of packed CPU weights, which later loads map
            into memory; the first that can be written to is used. Empty for no cache.
        adapter: the folder of a LoRA adapter, which is merged into the weights; None for none.

    Raises:
        CheckpointError: a file or tensor is missing or invalid; the message names it.
        ValueError: config.json has an unsupported value, or `quantize` does not fit the model's
            sizes; the message names the key or the matrix.
    """
    folder = folder_of(Path(path))
    opened = open_checkpoint(Path(path), allow_pickle, adapter)
    config, files, names, lora = opened.config, opened.files, opened.names, opened.lora
    if adapter is None and (folder / CONFIG_FILE).is_file():
        logger.warning("%s also holds a LoRA adapter, which is not applied", folder)
    cache = None
    if cache_folders and quantize != "none" and torch.device(device).type == "cpu":
        # The last bits of the projected rows depend on the kernel.
        kernels = torch.ops.voxkern.cpu_isa() if backend_for("cpu") == "native" else "reference"
        cache = WeightCache(
            cache_folders,
            f"{quantize}-{str(dtype).removeprefix('torch.')}-{kernels}",
            (STACKING_VERSION, LAYOUT_VERSION, *decoder_versions(files)),
            [*settings_files(folder), *opened.paths, *(lora.paths if lora else ())],
            opened.stamps,
        )
    log_unused(files, names, config)
    if lora:
        files, names = merged(files, names, config, lora)
    weights = _cached_weights(cache, config, dtype, quantize)
    if weights is None:
        weights = _read_weights(files, names, config, dtype, device, quantize)
        for source in files.sources:
            if isinstance(source, GgufTensors) and not lora:  # whose change would count as an error
                errors = second_rounding(source, names, config, weights)
                if line := rounding_line(source, errors):
                    logger.warning("%s", line)
        if cache and (kept := cache.save(weights.named())):
            weights = weights.with_named(kept)
    codec = {}
    for name in sorted(files.names):
        if name.startswith(CODEC_PREFIX):
            tensor = files.read(name).to(torch.float32, copy=True)
            refuse_not_finite(name, tensor, files.path(name))
            codec[name.removeprefix(CODEC_PREFIX)] = tensor
    codec_config = opened.settings.get("codec_config")
    return Checkpoint(folder, opened.settings, config, weights, codec or None, codec_config)


def load_codec(
    checkpoint: Checkpoint, codec: str | None = None, precision: str = "float32"
) -> Mimi:
    """Load the codec: `codec`, else the checkpoint's, else its file in the folder, else
    `kyutai/mimi`.

    It computes on the device of the checkpoint's weights.

    Args:
        checkpoint: from `load_checkpoint`.
        codec: a folder, file or hub id; None for the model's own.
        precision: precision of the decoder's matrices, as in `Mimi`.

    Raises:
        ModelNotFoundError: `codec`, or `kyutai/mimi` if it is needed, is unavailable.
        ValueError: the codec is no Mimi, or has fewer codebooks than the model.
    """
    device = checkpoint.weights.text_table.device
    if codec is None and checkpoint.codec_tensors is not None:
        mimi = mimi_from_checkpoint(
            checkpoint.codec_tensors, checkpoint.codec_config, precision, device
        )
        where = checkpoint.folder
    else:
        own = find_codec(checkpoint.folder) if codec is None else None
        where = own or resolve_codec(codec)
        mimi = load_mimi(where, precision, device)
    if mimi.config.num_codebooks < checkpoint.config.num_codebooks:
        raise CheckpointError(
            f"the codec in {where} has {mimi.config.num_codebooks} codebooks, the model "
            f"{checkpoint.config.num_codebooks}"
        )
    return mimi


def _cached_weights(
    cache: WeightCache | None, config: CsmConfig, dtype: torch.dtype, quantize: str
) -> CsmWeights | None:
    tensors = cache.load() if cache else None
    if tensors is None:
        return None
    try:
        return CsmWeights.empty(config, dtype, "meta", quantize).with_named(tensors)
    except ValueError:  # written by other code of the same version number
        return None


def _read_weights(
    files: TensorFiles,
    names: TensorNames,
    config: CsmConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: str,
) -> CsmWeights:
    weights = CsmWeights.empty(config, dtype, device, quantize)
    scratch = _Scratch()
    # The largest tensor first, while little else is in memory.
    _copy(files, names.text_table, weights.text_table)
    _copy(files, names.projection, weights.projection)
    _read_audio_tables(files, names, weights)
    for prefix, sizes, part in (
        (names.backbone, config.backbone, weights.backbone),
        (names.depth, config.depth, weights.depth),
    ):
        for i in range(sizes.num_layers):
            _read_layer(files, names, f"{prefix}layers.{i}.", sizes, part, i, scratch)
        _copy(files, f"{prefix}{names.norm}", part.norm)
    _copy(files, names.code0_head, weights.code0_head)
    with _plain(weights.code_heads, CsmWeights.shapes(config), "code_heads", scratch) as matrix:
        _copy(files, names.code_heads, matrix.transpose(1, 2))
    return weights


def _read_layer(
    files: TensorFiles,
    names: TensorNames,
    prefix: str,
    sizes: TransformerConfig,
    part: TransformerWeights,
    i: int,
    scratch: "_Scratch",
) -> None:
    def copy(key: str, out: Tensor, rotary_pairs: int | None = None) -> None:
        _copy(files, f"{prefix}{names.layer[key]}", out, rotary_pairs)

    shapes = {name: shape[1:] for name, shape in TransformerWeights.shapes(sizes).items()}
    copy("attn_norm", part.attn_norm[i])
    copy("mlp_norm", part.mlp_norm[i])
    head_dim = sizes.head_dim
    q_rows, kv_rows = sizes.num_heads * head_dim, sizes.num_kv_heads * head_dim
    rotary_pairs = head_dim if names.interleaved_rope else None
    with _plain(part.qkv[i], shapes, "qkv", scratch, prefix) as matrix:
        q, k, v = matrix.split((q_rows, kv_rows, kv_rows))
        copy("q", q, rotary_pairs)
        copy("k", k, rotary_pairs)
        copy("v", v)
    with _plain(part.o[i], shapes, "o", scratch, prefix) as matrix:
        copy("o", matrix)
    with _plain(part.gate_up[i], shapes, "gate_up", scratch, prefix) as matrix:
        gate, up = matrix.chunk(2)
        copy("gate", gate)
        copy("up", up)
    with _plain(part.down[i], shapes, "down", scratch, prefix) as matrix:
        copy("down", matrix)


class _Scratch:
    """Reused memory for one matrix: allocating it each time takes longer than filling it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def __call__(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        size = math.prod(shape)
        if size > self._memory.numel():
            self._memory = torch.empty(0)
            self._memory = torch.empty(size, dtype=torch.float32, device=device)
        return self._memory[:size].view(shape)


@contextmanager
def _plain(
    out: Tensor,
    shapes: dict[str, tuple[int, ...]],
    name: str,
    scratch: _Scratch,
    prefix: str = "",
) -> Iterator[Tensor]:
    """Yields the tensor to read a matrix into: `out`, or scratch that is then packed into `out`."""
    format = format_of(out)
    if format == "none":
        yield out
        return
    matrix = scratch(shapes[name], out.device)
    yield matrix
    try:
        out.copy_(pack(matrix, format))
    except ValueError as error:
        raise CheckpointError(f"{prefix}{name} cannot be packed as {format}: {error}") from None


def _copy(files: TensorFiles, name: str, out: Tensor, rotary_pairs: int | None = None) -> None:
    """Read a tensor into `out`, whose values must then be finite.

    Args:
        files: the checkpoint's files.
        name: name of the tensor.
        out: the destination, of the tensor's shape.
        rotary_pairs: the head width D if rows 2i and 2i + 1 of each head form a rotary pair; they
            become rows i and i + D/2.
    """
    source = files.source(name) if name in files else None
    if isinstance(source, GgufTensors) and out.dim() == 2 and not rotary_pairs:
        files.check(name, tuple(out.shape))
        for start in range(0, len(out), _DECODED_ROWS):
            part = out[start : start + _DECODED_ROWS]
            tensor = source.rows(name, start, start + len(part))
            part.copy_(tensor)
            refuse_not_finite(name, part, files.path(name), tensor)
        return
    tensor = files.read(name, tuple(out.shape))
    if rotary_pairs:
        heads = (out.shape[0] // rotary_pairs, rotary_pairs // 2, 2, out.shape[1])
        halves = (heads[0], 2, rotary_pairs // 2, out.shape[1])
        out.view(halves).copy_(tensor.view(heads).transpose(1, 2))
    else:
        out.copy_(tensor)
    refuse_not_finite(name, out, files.path(name), tensor)


def _read_audio_tables(files: TensorFiles, names: TensorNames, weights: CsmWeights) -> None:
    """Read the file's one or two audio tables. Each transformer uses its own if there is one."""
    tables = (names.audio_table, names.depth_audio_table)
    found = [name for name in tables if name in files]
    _copy(files, found[0], weights.audio_table)
    shape = tuple(weights.audio_table.shape)
    table = weights.audio_table
    if found[0] != found[-1]:  # not tied
        table = files.read(found[-1], shape)
        refuse_not_finite(found[-1], table, files.path(found[-1]))
    weights.project_audio_rows(table)
    if not is_finite(weights.depth_audio_rows):
        raise CheckpointError(
            f"the product of tensors {names.projection} and {found[-1]} in {files.paths[0]} "
            "overflows"
        )
