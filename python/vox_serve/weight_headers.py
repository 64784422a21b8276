"""Headers of weight files: names, shapes and types of tensors, without their values."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vox_serve.checkpoint import CODEC_PREFIX, DTYPE_NAMES, MAX_HEADER_BYTES
from vox_serve.gguf_header import GgufHeader
from vox_serve.gguf_names import is_crispasr, places, usage_of
from vox_serve.json_file import parse_json, shown

_MAX_DIMENSIONS = 16


class WeightHeader:
    """The tensors of one file; their values are not there (see `checkpoint.TensorSource`).

    Attributes:
        path: the file, for messages.
        names: of the tensors.
        shapes: by name.
        dtypes: of the values as they are read.
        stored: by name, the type in the file and the bytes of the values.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        self.stored: dict[str, tuple[str, int]] = {}

    def read(self, name: str) -> Tensor:
        raise TypeError(f"{name}: a header holds no values")

    @classmethod
    def of_gguf(cls, path: Path, header: GgufHeader) -> "WeightHeader":
        """The tensors of a GGUF file under a safetensors checkpoint's names.

        Raises:
            ValueError: two tensors are meant for one name.
        """
        self = cls(path)
        for name, place in places(header.tensors).items():
            source = header.tensors[place.source]
            self.names.append(name)
            self.shapes[name] = place.shape
            # Integers come from other files' tensors, which are no weights.
            self.dtypes[name] = torch.int32 if source.type.name[0] == "I" else torch.float32
            self.stored[name] = (source.type.name, source.num_bytes // place.parts)
            usage = usage_of(name) if is_crispasr(header.tensors) else None
            if usage:  # made up when it is read
                self.names.append(usage)
                self.shapes[usage], self.dtypes[usage] = place.shape[:1], torch.float32
        return self

    @classmethod
    def of_safetensors(cls, path: Path, file: IO[bytes], num_bytes: int | None) -> "WeightHeader":
        """The tensors of a safetensors file, from its start.

        Args:
            path: the file, for messages.
            file: only its `read` is called.
            num_bytes: length of the whole file; None if unknown.

        Raises:
            ValueError: it is no safetensors file; the message gives the reason, not the file.
        """
        self = cls(path)
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_HEADER_BYTES:
            raise ValueError("it has no header of safetensors")
        text = file.read(length)
        if len(text) < length:
            raise ValueError("it ends within its header")
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        for name, entry in header.items():
            if name != "__metadata__":
                self._add(name, entry, None if num_bytes is None else num_bytes - 8 - length)
        # The library refuses gaps and what follows the last value.
        spans = sorted(header[name]["data_offsets"] for name in self.names)
        ends = [0, *(end for _, end in spans)]
        last = ends[-1] if num_bytes is None else num_bytes - 8 - length
        if [*(start for start, _ in spans), last] != ends:
            raise ValueError("its values overlap, have gaps or do not end where the file does")
        return self

    def _add(self, name: str, entry: Any, data_bytes: int | None) -> None:
        entry = entry if isinstance(entry, Mapping) else {}
        dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if (
            not isinstance(dtype, str)
            or not _are_sizes(shape)
            or not _are_sizes(offsets)
            or len(offsets) != 2
            or not offsets[0] <= offsets[1]
        ):
            raise ValueError(f"its header has no tensor in {shown(name)}")
        known = DTYPE_NAMES.get(dtype)
        if known is not None and math.prod(shape) * known.itemsize != offsets[1] - offsets[0]:
            raise ValueError(f"tensor {shown(name)} has no {dtype} values of {shape}")
        if data_bytes is not None and offsets[1] > data_bytes:
            raise ValueError(f"tensor {shown(name)} ends beyond the file's end")
        self.names.append(name)
        self.shapes[name] = tuple(shape)
        self.dtypes[name] = known or dtype
        self.stored[name] = (dtype, offsets[1] - offsets[0])


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def stored_bytes(headers: list[WeightHeader], codec: bool) -> dict[str, int]:
    """Bytes of the codec's tensors, or of all others, by their type in the files."""
    total: Counter[str] = Counter()
    for header in headers:
        for name, (dtype, num_bytes) in header.stored.items():
            if name.startswith(CODEC_PREFIX) == codec:
                total[dtype] += num_bytes
    return dict(total.most_common())
