"""Reads tensors of a GGUF file under the names of a safetensors checkpoint."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vox_serve.checkpoint import CheckpointError, TensorFiles
from vox_serve.gguf_header import TensorPlace, read_header
from vox_serve.gguf_names import Place, is_crispasr, places, usage_of

_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types whose values torch has; the others are blocks of rounded values."""

PLAIN_TYPES = frozenset(_PLAIN)
"""Their names."""

_CHUNK_BYTES = 4 << 20
"""Bytes of blocks that are read and dequantised at a time."""


class GgufTensors:
    """The tensors of one GGUF file by name, each read on request.

    Names, shapes and values are those of a safetensors checkpoint (see `gguf_names`): fused tensors
    are divided, dropped dimensions are added. Blocks of rounded values become float32.

    Args:
        path: the file.

    Attributes:
        names: of the tensors.
        shapes: by name.
        dtypes: of the tensors that `read` returns, by name.

    Raises:
        CheckpointError: the file cannot be read; one line names it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header = read_header(path)
        try:
            self._places = places(self.header.tensors)
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from None
        self._ones: dict[str, tuple[int, ...]] = {}
        if is_crispasr(self.header.tensors):
            for name, place in self._places.items():
                if usage := usage_of(name):
                    self._ones[usage] = place.shape[:1]
        self.shapes = {name: place.shape for name, place in self._places.items()} | self._ones
        self.dtypes: dict[str, torch.dtype | str] = {
            name: _PLAIN.get(self.type_of(name), torch.float32) for name in self.shapes
        }
        self.names = list(self.shapes)

    def type_of(self, name: str) -> str:
        """ggml's name of the type of a tensor's values in the file."""
        if name in self._ones:
            return "F32"
        return self.header.tensors[self._places[name].source].type.name

    @property
    def rounded(self) -> list[str]:
        """Names of the tensors whose values in the file are blocks of rounded values."""
        return [name for name in self.names if self.type_of(name) not in _PLAIN]

    def read(self, name: str) -> Tensor:
        """Read a whole tensor.

        Raises:
            CheckpointError: the file cannot be read, or has blocks that nobody can decode.
        """
        if name in self._ones:
            return torch.ones(self._ones[name])
        place = self._places[name]
        return self.rows(name, 0, _num_rows(place.shape)).view(place.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some rows: `[stop - start, C]`, with all dimensions but the last one as rows.

        Raises:
            CheckpointError: see `read`.
        """
        place = self._places[name]
        stored = self.header.tensors[place.source]
        try:
            return self._rows(place, stored, start, stop)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from None
        except ValueError as error:
            raise CheckpointError(f"tensor {name} in {self.path}: {error}") from None

    def _rows(self, place: Place, stored: TensorPlace, start: int, stop: int) -> Tensor:
        columns = place.shape[-1] if place.shape else 1
        row_bytes = columns // stored.type.num_values * stored.type.num_bytes
        first = place.part * _num_rows(place.shape) + start
        at = stored.start + first * row_bytes
        dtype = _PLAIN.get(stored.type.name)
        if dtype is not None:
            data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
            with open(self.path, "rb", buffering=0) as file:
                _read_into(file, at, data.numpy().data)
            return data.view(dtype).view(stop - start, columns)
        out = torch.empty(stop - start, columns)
        values = out.numpy()
        with open(self.path, "rb", buffering=0) as file:
            for begin, end in _chunks(stop - start, row_bytes):
                blocks = np.empty((end - begin, row_bytes), np.uint8)
                _read_into(file, at + begin * row_bytes, blocks.data.cast("B"))
                values[begin:end] = _dequantised(blocks, stored)
        return out


def decoder_versions(files: TensorFiles) -> list[str]:
    """The version of the package that decodes blocks of rounded values, if the files hold any."""
    sources = [source for source in files.sources if isinstance(source, GgufTensors)]
    if not any(source.rounded for source in sources):
        return []
    try:
        return [f"gguf {metadata.version('gguf')}"]
    except metadata.PackageNotFoundError:
        return ["no gguf"]


def _num_rows(shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def _chunks(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, num_rows, step):
        yield start, min(num_rows, start + step)


def _read_into(file: Any, at: int, memory: memoryview) -> None:
    file.seek(at)
    while memory:
        count = file.readinto(memory)
        if not count:
            raise ValueError("the file became shorter while it was read")
        memory = memory[count:]


def _dequantised(blocks: np.ndarray, stored: TensorPlace) -> np.ndarray:
    """The values of blocks `[N, bytes of a row]`: float32 `[N, C]`.

    Raises:
        ValueError: the package is not installed, or see `_refuse_lost_minima`.
    """
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise ValueError(
            f"{stored.type.name} blocks need the package gguf: pip install 'voxkern[gguf]'"
        ) from None
    if stored.type.name == "Q4_K":
        _refuse_lost_minima(blocks)
    kind = GGMLQuantizationType[stored.type.name]
    with np.errstate(all="ignore"):  # values that are not finite are refused by their reader
        values: np.ndarray = dequantize(blocks, kind)
    return values


def _refuse_lost_minima(blocks: np.ndarray) -> None:
    """Refuse Q4_K blocks as csm.rs' scripts/quantize.py writes them.

    ggml subtracts a multiple of dmin, which is 0 or more, for each 32 values. The script stores the
    block's least value as dmin, and no multiples: what each group was shifted by is lost.

    Raises:
        ValueError: most blocks have a negative dmin.
    """
    minima = blocks.reshape(-1, 144)[:, 2:4].copy().view(np.float16)
    if 2 * np.count_nonzero(minima < 0) > len(minima):
        raise ValueError(
            "its Q4_K blocks are not ggml's but those of csm.rs' scripts/quantize.py, which leaves "
            "out what is needed to decode them: take a q8_0 file"
        )
