"""Tensors of a pickled state dict. Nothing but plain tensors is unpickled."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vox_serve.checkpoint import CheckpointError
from vox_serve.json_file import refuse_special

MAX_VIEWS = 4
"""All tensors together may have so many times the bytes of their file."""

_STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")


class PickledTensors:
    """A pickled state dict."""

    def __init__(self, path: Path):
        self.path = path
        try:
            _check_archive(path)
            tensors = _state(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:  # which errors torch.load raises depends on the bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} cannot be read as plain tensors: {reason}") from None
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path} holds no dict of tensors")
        self._tensors = {
            name: value.detach()
            for name, value in tensors.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        self.names = list(self._tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes: dict[str, torch.dtype | str] = {}
        max_bytes = path.stat().st_size
        for name, tensor in self._tensors.items():
            # A view with strides of 0 has any number of elements in a few bytes.
            if tensor.layout != torch.strided or tensor.nbytes > max_bytes:
                raise CheckpointError(f"{path}: tensor {name} is larger than the file")
            self.dtypes[name] = tensor.dtype
        # Tied weights are several views of one storage; many more would fill the memory.
        if sum(tensor.nbytes for tensor in self._tensors.values()) > MAX_VIEWS * max_bytes:
            raise CheckpointError(f"{path}: its tensors are {MAX_VIEWS} times as large as the file")

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _state(value: Any) -> Any:
    """The state dict in a trainer's checkpoint, which has the optimizer's beside it."""
    if isinstance(value, dict):
        for key in _STATE_KEYS:
            if isinstance(value.get(key), dict):
                return value[key]
    return value


def _check_archive(path: Path) -> None:
    """Refuse a .pt whose parts expand: torch.save writes a zip file without compression."""
    refuse_special(path)
    if not zipfile.is_zipfile(path):
        return  # torch.load refuses other formats, since it is to map the file
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("a part of it is compressed")
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
