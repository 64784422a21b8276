"""Reads the header of a GGUF file within bounds: metadata, and the place of each tensor.

Source of the layout: the specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
The package `gguf` has a reader too, which maps the whole file and makes several objects for each
item of an array; this one reads a stream, so it serves files on the hub as well, and takes no more
memory than the header has bytes, whatever its counts say.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from vox_serve.checkpoint import CheckpointError
from vox_serve.json_file import refuse_special, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MAX_HEADER_BYTES = 64 << 20
"""Longest header; with Llama 3's tokens and merges it has about 8 MB."""
MAX_TENSORS = 2**14
MAX_KEYS = 2**14
MAX_STRINGS = 2**20
"""Most strings of all arrays together; Llama 3's tokens and merges are 410,000."""
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 16


class BlockType(NamedTuple):
    """A kind of storage for a tensor's values.

    Attributes:
        name: ggml's name.
        num_values: values in a block; blocks lie along the last dimension.
        num_bytes: bytes of a block.
    """

    name: str
    num_values: int
    num_bytes: int


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    30: BlockType("BF16", 1, 2),
}
"""Types by their number in a file."""

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q"}
_NUMBERS |= {7: "<?", 12: "<d"}
_STRING, _ARRAY = 8, 9


class TensorPlace(NamedTuple):
    """The place of a tensor's values in a file.

    Attributes:
        shape: in torch's order, the last dimension contiguous.
        type: how the values are stored.
        start: first byte in the file.
        num_bytes: number of bytes.
    """

    shape: tuple[int, ...]
    type: BlockType
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A file's header.

    Attributes:
        metadata: values by key: int, float, bool, str, a list of str, or a numpy array.
        tensors: by name, in the file's order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]


def read_header(path: Path) -> GgufHeader:
    """Read the header of a local file.

    Raises:
        CheckpointError: the file cannot be read, or is no acceptable GGUF; one line names it.
    """
    try:
        refuse_special(path)
        with open(path, "rb") as file:
            return parse_header(file, path.stat().st_size)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from None


def parse_header(file: IO[bytes], file_bytes: int) -> GgufHeader:
    """Read a header from the start of a stream.

    Args:
        file: only its `read` is called.
        file_bytes: length of the whole file.

    Raises:
        ValueError: it is no acceptable GGUF; the message gives the reason, not the file.
    """
    reader = _Reader(file.read, file_bytes)
    if (magic := reader.bytes(4)) != MAGIC:
        raise ValueError(f"it starts with {shown(magic)}, not with {shown(MAGIC)}")
    version = reader.number("<I")
    if version not in VERSIONS:
        order = " (big-endian files are not supported)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"its version is {version}, not 2 or 3{order}")
    num_tensors, num_keys = reader.number("<Q"), reader.number("<Q")
    for what, count, most in (("tensors", num_tensors, MAX_TENSORS), ("keys", num_keys, MAX_KEYS)):
        if count > most:
            raise ValueError(f"it has {count} {what}; read are at most {most}")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = reader.name("a key")
        if key in metadata:
            raise ValueError(f"key {shown(key)} is given twice")
        metadata[key] = reader.value(key, reader.number("<I"))
    infos: dict[str, tuple[tuple[int, ...], BlockType, int]] = {}
    for _ in range(num_tensors):
        name = reader.name("a tensor's name")
        if name in infos:
            raise ValueError(f"tensor {shown(name)} is given twice")
        infos[name] = _tensor_info(reader, name)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment % 8:
        raise ValueError(
            f"general.alignment must be a multiple of 8 up to {_MAX_ALIGNMENT}, got "
            f"{shown(alignment)}"
        )
    data_start = -(-reader.position // alignment) * alignment
    return GgufHeader(metadata, _places(infos, alignment, data_start, file_bytes))


class _Reader:
    """Reads numbers and strings from a stream, no more than a header may have."""

    def __init__(self, read: Callable[[int], bytes], file_bytes: int):
        self._read, self._file_bytes = read, file_bytes
        self.position = 0
        self._num_strings = 0

    def bytes(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            ValueError: the file, or the longest header that is read, ends before.
        """
        end = self.position + count
        if end > self._file_bytes:
            raise ValueError(f"it ends within its header, after {self._file_bytes} bytes")
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"its header is longer than {MAX_HEADER_BYTES} bytes")
        data = self._read(count)
        if len(data) != count:
            raise ValueError("it became shorter while it was read")
        self.position = end
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.bytes(self.number("<Q")).decode("utf-8", "replace")

    def name(self, what: str) -> str:
        length = self.number("<Q")
        if length > MAX_NAME_BYTES:
            raise ValueError(f"{what} has {length} bytes; read are at most {MAX_NAME_BYTES}")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8") from None

    def value(self, key: str, kind: int) -> Any:
        """A key's value of a kind by the format's number."""
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"key {shown(key)} has a value of unknown kind {kind}")
        item, count = self.number("<I"), self.number("<Q")
        if item in _NUMBERS:
            form = np.dtype(_NUMBERS[item])
            return np.frombuffer(self.bytes(form.itemsize * count), form)
        if item != _STRING:
            raise ValueError(f"key {shown(key)} has a list of unsupported kind {item}")
        self._num_strings += count
        if self._num_strings > MAX_STRINGS:
            raise ValueError(f"its lists have more than {MAX_STRINGS} strings")
        return [self.string() for _ in range(count)]


def _tensor_info(reader: _Reader, name: str) -> tuple[tuple[int, ...], BlockType, int]:
    num_dimensions = reader.number("<I")
    if num_dimensions > MAX_DIMENSIONS:
        raise ValueError(f"tensor {shown(name)} has {num_dimensions} dimensions, not 0 to 4")
    shape = tuple(reversed([reader.number("<Q") for _ in range(num_dimensions)]))
    number, offset = reader.number("<I"), reader.number("<Q")
    if number not in TYPES:
        raise ValueError(f"tensor {shown(name)} has type {number}, which is not supported")
    return shape, TYPES[number], offset


def _places(
    infos: dict[str, tuple[tuple[int, ...], BlockType, int]],
    alignment: int,
    data_start: int,
    file_bytes: int,
) -> dict[str, TensorPlace]:
    """Check that each tensor has values of its own within the file."""
    places = {}
    for name, (shape, kind, offset) in infos.items():
        num_values = math.prod(shape)
        if not num_values:
            raise ValueError(f"tensor {shown(name)} is empty: {list(shape)}")
        row = shape[-1] if shape else 1
        if row % kind.num_values:
            raise ValueError(
                f"tensor {shown(name)} has rows of {row} values, but blocks of {kind.name} have "
                f"{kind.num_values}"
            )
        if offset % alignment:
            raise ValueError(f"tensor {shown(name)} starts at {offset}, not on {alignment} bytes")
        num_bytes = num_values // kind.num_values * kind.num_bytes
        start = data_start + offset
        if start + num_bytes > file_bytes:
            raise ValueError(
                f"tensor {shown(name)} ends at byte {start + num_bytes}, beyond the file's end at "
                f"{file_bytes}"
            )
        places[name] = TensorPlace(shape, kind, start, num_bytes)
    previous = None
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        if previous and place.start < places[previous].start + places[previous].num_bytes:
            raise ValueError(f"tensors {shown(previous)} and {shown(name)} overlap")
        previous = name
    return places
