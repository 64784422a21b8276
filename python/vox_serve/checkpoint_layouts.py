"""Reads fine-tunes and conversions that differ from the published checkpoints: a prefix before the
names, tensors that CSM has no use for, weights of other precisions, no config.json."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vox_serve.checkpoint import CODEC_PREFIX, CheckpointError, TensorFiles, TensorSource
from vox_serve.json_file import shown
from vox_serve.model_config import FLAVORS, CsmConfig
from vox_serve.tensor_keys import tensor_keys
from vox_serve.tensor_names import HF, TensorNames, find_names

logger = logging.getLogger("vox_serve")

_BUFFERS = ("causal_mask", "inv_freq", "audio_tokens_offsets", "cache_pos", "k_cache", "v_cache")
"""Ends of names of buffers, which are computed at load."""
_SHOWN_NAMES = 5


def csm_tensors(files: TensorFiles, settings: Mapping[str, Any]) -> tuple[TensorFiles, TensorNames]:
    """A checkpoint's tensors, by the names of a known format.

    Names may have a prefix before those, as trainers and conversions add it: `model.`, `module.`,
    `_orig_mod.`.

    Args:
        files: the checkpoint's files.
        settings: config.json, parsed.

    Raises:
        CheckpointError: they are no CSM's, or quantised by another program, or have LoRA factors
            that are not merged; one line says what to do.
    """
    found = find_csm(files)
    if found is None:
        raise CheckpointError(
            f"{files.paths[0]} holds no CSM: it has no tensors such as {HF.code_heads}"
        )
    files, names = found
    refuse_other_weights(files, names, settings)
    return files, names


def refuse_other_weights(
    files: TensorFiles, names: TensorNames, settings: Mapping[str, Any]
) -> None:
    """Refuse weights that another program quantised, and LoRA factors that are not merged.

    Raises:
        CheckpointError: see above; one line says what to do.
    """
    matrix = f"{names.backbone}layers.0.{names.layer['q']}"
    for name in sorted(files.names_below(matrix.removesuffix("weight"))):
        if "lora" in name:
            raise CheckpointError(
                f"{files.path(name)} has LoRA factors that are not merged ({name}): merge them "
                "with the trainer that wrote them"
            )
    dtype = files.source(matrix).dtypes[matrix] if matrix in files else None
    if _is_quantised(settings) and not str(dtype).startswith(("torch.float", "torch.bfloat")):
        raise CheckpointError(
            f"{files.paths[0]} is quantised ({_method(settings)}; {matrix} is {dtype}): take the "
            "float16, bfloat16 or float32 weights, which --quantize packs"
        )


def log_unused(files: TensorFiles, names: TensorNames, config: CsmConfig) -> None:
    """Log the tensors that are left out: extra heads, for example."""
    known = set(tensor_keys(names, config).values())
    unused = sorted(
        name
        for name in files.names
        if name not in known and not name.startswith(CODEC_PREFIX) and not name.endswith(_BUFFERS)
    )
    if unused:
        more = f" and {len(unused) - _SHOWN_NAMES} more" if len(unused) > _SHOWN_NAMES else ""
        shown_names = ", ".join(name[:100] for name in unused[:_SHOWN_NAMES])
        logger.warning("%s: left out are tensors %s%s", files.paths[0], shown_names, more)


def inferred_settings(folder: Path, files: TensorFiles) -> dict[str, Any]:
    """The config.json of a folder without one, by the tensors' shapes, in the original's keys.

    Raises:
        CheckpointError: the tensors are no CSM's, or of other sizes than the published models'.
    """
    files, names = csm_tensors(files, {})
    missing = f"{folder} has no config.json, and "

    def size(name: str, axis: int) -> int:
        shape = files.shape(name)
        if shape is None or len(shape) <= axis:
            raise CheckpointError(f"{missing}tensor {name} does not give a size")
        return shape[axis]

    def flavor(prefix: str, dim: int) -> str:
        layers = f"{prefix}layers."
        indices = {
            name.removeprefix(layers).partition(".")[0] for name in files.names_below(layers)
        }
        gate = size(f"{layers}0.{names.layer['gate']}", 0)
        for name, sizes in FLAVORS.items():
            found = (sizes["num_hidden_layers"], sizes["hidden_size"], sizes["intermediate_size"])
            if found == (len(indices), dim, gate):
                return name
        raise CheckpointError(
            f"{missing}{len(indices)} layers of width {dim} in {layers[:-1]} are of no known model "
            f"({', '.join(FLAVORS)}): write a config.json"
        )

    return {
        "backbone_flavor": flavor(names.backbone, size(names.text_table, 1)),
        "decoder_flavor": flavor(names.depth, size(names.projection, 0)),
        "text_vocab_size": size(names.text_table, 0),
        "audio_vocab_size": size(names.code0_head, 0),
        "audio_num_codebooks": size(names.code_heads, 0) + 1,
    }


def find_csm(files: TensorFiles) -> tuple[TensorFiles, TensorNames] | None:
    """The tensors by the names of a known format, without a prefix; None if they are no CSM's."""
    found = find_names(files.names)
    if found is None:
        return None
    prefix, names = found
    if not prefix:
        return files, names
    distinct = dict.fromkeys(map(files.source, files.names))
    renamed = {file: _Renamed(file, prefix) for file in distinct}
    sources: dict[str, TensorSource] = {
        name.removeprefix(prefix): renamed[files.source(name)] for name in files.names_below(prefix)
    }
    return files.with_sources(sources, alone=True), names


class _Renamed:
    """A file's tensors without a prefix of their names: a `TensorSource`."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self.path = source.path
        self.shapes = _without(source.shapes, prefix)
        self.dtypes = _without(source.dtypes, prefix)
        self.names = list(self.shapes)
        self._source, self._prefix = source, prefix

    def read(self, name: str) -> Tensor:
        return self._source.read(self._prefix + name)


def _without(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def _is_quantised(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("quantization_config") or settings.get("quantization"))


def _method(settings: Mapping[str, Any]) -> str:
    """The program that quantised the weights, as config.json names it."""
    config = settings.get("quantization_config")
    if isinstance(config, Mapping) and (method := config.get("quant_method")):
        return shown(method)[:50]
    return "MLX" if settings.get("quantization") else "by another program"
