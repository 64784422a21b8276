"""Tensors of a state dict that torch.save wrote. Nothing is unpickled: see `plain_pickle`."""

import io
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vox_serve.checkpoint import CheckpointError
from vox_serve.json_file import refuse_special, shown
from vox_serve.plain_pickle import Named, read_pickle

MAX_VIEWS = 4
"""All tensors together may have so many times the bytes of their file."""

MAX_READ_BYTES = 2 << 20
"""Longest pickle, and list of the file's parts; those of 400 tensors have 0.1 MB. A value of the
pickle takes up to 100 times its bytes."""

_STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")
_LOCAL_HEADER_BYTES = 30
_MAX_DIMENSIONS = 16

_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
}
"""dtypes of weights by the names of torch's storages; others are shown by that name."""

_TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")
_PARAMETERS = (
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
)


class _File(io.FileIO):
    """A file of which zipfile cannot read much at once: its list of parts may have any length."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_READ_BYTES + 1
        data: bytes = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) == most:
            raise ValueError(f"its pickle or its list of parts exceeds {MAX_READ_BYTES} bytes")
        return data


class _Storage(NamedTuple):
    """A storage as a pickle describes it: the name of its kind, and of the part of the file."""

    kind: str
    part: str


class _Stored(NamedTuple):
    """A tensor as a pickle describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class PickledTensors:
    """The tensors of one file, each mapped when it is read."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        self._tensors: dict[str, _Stored] = {}
        try:
            refuse_special(path)
            with _File(path) as file, zipfile.ZipFile(file) as archive:
                parts = _parts(archive, path.stat().st_size)
                self._places = {name: _place(file, part) for name, part in parts.items()}
                self._add(read_pickle(archive.read(parts["data.pkl"]), _made))
        except Exception as error:  # which errors a zip file raises depends on its bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} cannot be read as plain tensors: {reason}") from None
        self.names = list(self._tensors)
        self._check_sizes(path.stat().st_size)

    def read(self, name: str) -> Tensor:
        stored = self._tensors[name]
        start, num_bytes = self._places[stored.storage.part]
        end, dtype = start + num_bytes, self.dtypes[name]
        file = torch.from_file(str(self.path), shared=False, size=end, dtype=torch.uint8)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} has dtype {dtype}")  # which `TensorFiles.read` refuses
        part = file[start : start + num_bytes // dtype.itemsize * dtype.itemsize]
        flat = (part.clone() if start % dtype.itemsize else part).view(dtype)
        first = flat.storage_offset() + stored.offset
        return flat.as_strided(stored.shape, stored.stride, first)

    def _add(self, value: Any) -> None:
        state = _state(value)
        for name, tensor in state.items() if isinstance(state, dict) else ():
            if isinstance(tensor, _Stored):
                self._tensors[name] = tensor
                self.shapes[name] = tensor.shape
                self.dtypes[name] = _STORAGES.get(tensor.storage.kind, tensor.storage.kind)
        if not self._tensors:
            raise ValueError("it holds no dict of tensors")

    def _check_sizes(self, file_bytes: int) -> None:
        """Refuse tensors that are larger than the file, or not within their part of it."""
        total = 0
        for name, (storage, offset, shape, stride) in self._tensors.items():
            dtype = self.dtypes[name]
            item_bytes = dtype.itemsize if isinstance(dtype, torch.dtype) else 1
            num_values, last = 1, offset
            for size, step in zip(shape, stride, strict=True):
                num_values *= size
                last += (size - 1) * step
            # A view with strides of 0 has any number of elements in a few bytes.
            if num_values * item_bytes > file_bytes:
                raise CheckpointError(f"{self.path}: tensor {name} is larger than the file")
            _, num_bytes = self._places.get(storage.part, (0, -1))
            if (last + 1 if num_values else 0) * item_bytes > num_bytes:
                raise CheckpointError(f"{self.path}: tensor {name} is larger than its storage")
            total += num_values * item_bytes
        # Tied weights are several views of one storage; many more would fill the memory.
        if total > MAX_VIEWS * file_bytes:
            raise CheckpointError(
                f"{self.path}: its tensors are {MAX_VIEWS} times as large as the file"
            )


def _state(value: Any) -> Any:
    """The state dict in a trainer's checkpoint, which has the optimizer's beside it."""
    if isinstance(value, dict):
        for key in _STATE_KEYS:
            if isinstance(value.get(key), dict):
                return value[key]
    return value


def _made(called: Any, arguments: Any) -> Any:
    """The value for a call in a pickle: a tensor, storage or dict, else None.

    Raises:
        ValueError: a tensor's description is no such thing.
    """
    if called is None:
        _, kind, part, *_ = arguments
        if not (isinstance(kind, Named) and isinstance(part, str)):
            raise ValueError("it has a storage without a kind or name")
        return _Storage(kind.name, f"data/{part}")
    name = called.name if isinstance(called, Named) else ""
    if name == "collections OrderedDict":
        return {}
    if name in _PARAMETERS:
        return arguments[0]
    if name == "torch._tensor _rebuild_from_type_v2":
        return _made(arguments[0], arguments[2])
    if name not in _TENSORS:
        return None
    stored = _Stored(*arguments[:4])
    if not (
        isinstance(stored.storage, _Storage)
        and _are_sizes((stored.offset,))
        and _are_sizes(stored.shape)
        and _are_sizes(stored.stride)
        and len(stored.shape) == len(stored.stride)
    ):
        raise ValueError("it has a tensor without a storage, shape or strides")
    return stored


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _parts(archive: zipfile.ZipFile, file_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The file's parts by their names below its one folder.

    torch.save writes a zip file without compression.

    Raises:
        ValueError: it is another zip file.
    """
    found = {part.filename.partition("/")[2]: part for part in archive.infolist()}
    if any(part.compress_type != zipfile.ZIP_STORED for part in found.values()):
        raise ValueError("a part of it is compressed")
    if sum(part.file_size for part in found.values()) > file_bytes:
        raise ValueError("its parts are larger than the file")
    if "data.pkl" not in found:
        raise ValueError("it has no data.pkl: torch.save did not write it")
    if "byteorder" in found and archive.read(found["byteorder"]) != b"little":
        raise ValueError("it is not little-endian")
    return found


def _place(file: Any, part: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte of a part's content in the file, and its length.

    Raises:
        ValueError: the part is not within the file.
    """
    file.seek(part.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    start = part.header_offset + _LOCAL_HEADER_BYTES
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + part.file_size > file.seek(0, 2):
        raise ValueError(f"its part {shown(part.filename)} ends beyond the file's end")
    return start, part.file_size
