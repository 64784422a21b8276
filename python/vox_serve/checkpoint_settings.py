"""Reads a checkpoint's config.json, or tells why a folder is no model."""

from pathlib import Path
from typing import Any

from vox_serve.adapter_config import why_adapter
from vox_serve.checkpoint import (
    WEIGHT_SUFFIXES,
    CheckpointError,
    TensorFiles,
    find_weights,
    read_json,
    weights_entry,
)
from vox_serve.checkpoint_layouts import inferred_settings

SETTINGS_FILE = "config.json"


def read_settings(folder: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """The settings of a model's folder: config.json, parsed, or what the tensors' shapes tell.

    Args:
        folder: the model's folder.
        allow_pickle: pickled weights may be read.

    Raises:
        CheckpointError: the file is invalid, or missing and the tensors are not those of a
            published model, or the folder holds no model but an adapter; one line says what to do.
    """
    path = folder / SETTINGS_FILE
    settings = read_json(path) if path.exists() else {}
    files = [item.name for item in folder.iterdir()]
    if weights_entry(settings, files) is None and (reason := why_adapter(folder)):
        raise CheckpointError(reason)
    if not path.exists() and any(name.endswith(WEIGHT_SUFFIXES) for name in files):
        return inferred_settings(folder, TensorFiles(find_weights(folder, {}, allow_pickle)))
    return settings or read_json(path)


def settings_files(folder: Path) -> list[Path]:
    """The files that `read_settings` reads, if there are any."""
    path = folder / SETTINGS_FILE
    return [path] if path.is_file() else []
