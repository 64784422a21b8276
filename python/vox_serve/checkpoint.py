"""Finds the weight files in a checkpoint folder and reads tensors from them.

Pickle files are not read unless the caller allows it, and nothing in them is run.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vox_serve.json_file import read_json_file, refuse_special

# Files that hold only the codec; never mistaken for the model.
CODEC_FILE_PATTERNS = ("mimi.safetensors", "tokenizer-*.safetensors")
PICKLE_FILE = "ckpt.pt"
PICKLED = (".pt", ".pth", ".bin")
WEIGHT_SUFFIXES = (".safetensors", *PICKLED)
ADAPTER_FILE, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"  # peft's
MLX_ADAPTER = "adapters.safetensors"
_ADAPTERS = (ADAPTER_FILE, MLX_ADAPTER)
_NO_MODELS = (
    ADAPTER_PICKLE,
    "optimizer.pt",
    "rng_state.pth",
    "scaler.pt",
    "scheduler.pt",
    "training_args.bin",
)
"""Pickled files that trainers write beside a model."""
CODEC_PREFIX = "codec_model."

_INDEX_SUFFIX = ".safetensors.index.json"
_USUAL_FILES = (f"transformers{_INDEX_SUFFIX}", f"model{_INDEX_SUFFIX}", "model.safetensors")


MAX_HEADER_BYTES = 16 << 20
"""Longest header of a safetensors file; that of a file with 10,000 tensors has 1 MB."""
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""dtypes by safetensors' names; others are shown by that name."""


class CheckpointError(ValueError):
    """An invalid checkpoint; the message is one line that names the file or tensor."""


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that must hold a JSON object.

    Raises:
        CheckpointError: the file is missing, is no acceptable JSON (see `read_json_file`), or holds
            something else.
    """
    try:
        value = read_json_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def weights_entry(config: Mapping[str, Any], files: Iterable[str]) -> str | None:
    """The file that holds the model's weights, or the index that names its shards.

    A repository may hold the model twice, in transformers' format and in the original one. The
    first that exists is used: the file that config.json names as `transformers_weights`,
    transformers' indexes, `model.safetensors` (either format), a single `.safetensors` file.

    Args:
        config: config.json, parsed.
        files: names of the files in the folder or repository, relative to it.

    Returns:
        A name in `files`, or None.
    """
    files = set(files)
    named = config.get("transformers_weights")
    for name in (named, *_USUAL_FILES):
        if isinstance(name, str) and name in files:
            return name
    rest = [name for name in files if "/" not in name and name.endswith(".safetensors")]
    rest = [name for name in rest if not is_codec_file(name) and name not in _ADAPTERS]
    return rest[0] if len(rest) == 1 else None


def pickled_entry(files: Iterable[str]) -> str | None:
    """The pickle file that holds the model's weights, of files without `weights_entry`; or None."""
    found = [name for name in files if name.endswith(PICKLED) and "/" not in name]
    found = [name for name in found if name.rpartition("/")[2] not in _NO_MODELS]
    return PICKLE_FILE if PICKLE_FILE in found else found[0] if len(found) == 1 else None


def only_pickled(name: str) -> str:
    """The refusal of a folder with pickled weights alone, to follow the folder's name."""
    return (
        f"has only {name}, a pickle file: allow pickle files explicitly if you trust it "
        "(--allow_pickle), or convert it to safetensors"
    )


def is_codec_file(name: str) -> bool:
    """True if a file's name marks it as the codec's."""
    return any(PurePosixPath(name).match(pattern) for pattern in CODEC_FILE_PATTERNS)


def shard_names(index: Mapping[str, Any], index_name: str) -> list[str]:
    """The shards that an index names, relative to its folder.

    Raises:
        CheckpointError: the index has no `weight_map`, or names a file outside its folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index_name} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{index_name} names {name}, which is outside its folder")
    return names


def find_weights(folder: Path, config: Mapping[str, Any], allow_pickle: bool) -> list[Path]:
    """The files that hold the model's weights (see `weights_entry`).

    Raises:
        CheckpointError: there are none, a shard is missing, or there are only pickled ones and
            `allow_pickle` is false.
    """
    files = [path.name for path in folder.iterdir()]
    entry = weights_entry(config, files)
    if entry is None:
        name = pickled_entry(files)
        if name is None:
            raise CheckpointError(f"{folder} has no weights: expected {', '.join(_USUAL_FILES)}")
        if allow_pickle:
            return [folder / name]
        raise CheckpointError(f"{folder} {only_pickled(name)}")
    if not entry.endswith(".json"):
        return [folder / entry]
    paths = [folder / name for name in shard_names(read_json(folder / entry), entry)]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{folder / entry} names {path.name}, which does not exist")
    return paths


def find_codec(folder: Path) -> Path | None:
    """The codec's own file in a model's folder, or None."""
    found = (file for pattern in CODEC_FILE_PATTERNS for file in sorted(folder.glob(pattern)))
    return next(found, None)


class TensorFiles:
    """The tensors of one or more files by name, each read on request.

    Args:
        paths: safetensors files, one GGUF file (`.gguf`), or one pickle file (`.pt`).

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, paths: Iterable[Path]):
        self.paths = list(paths)
        self.sources = [_open(path) for path in self.paths]
        self._source: dict[str, TensorSource] = {}
        for source in self.sources:
            self._source |= dict.fromkeys(source.names, source)

    @classmethod
    def of(cls, sources: "Iterable[TensorSource]") -> "TensorFiles":
        """The tensors of files that are already open."""
        files = cls([])
        files.sources = list(sources)
        files.paths = [source.path for source in files.sources]
        for source in files.sources:
            files._source |= dict.fromkeys(source.names, source)
        return files

    def __contains__(self, name: object) -> bool:
        return name in self._source

    @property
    def names(self) -> set[str]:
        return set(self._source)

    def source(self, name: str) -> "TensorSource":
        """The file that holds a tensor."""
        return self._source[name]

    def with_sources(
        self, sources: Mapping[str, "TensorSource"], alone: bool = False
    ) -> "TensorFiles":
        """The same files, but some tensors, by name, come from other sources.

        Args:
            sources: where to read the tensors of these names.
            alone: leave out all others.
        """
        files = TensorFiles([])
        files.paths, files.sources = self.paths, self.sources
        files._source = {**({} if alone else self._source), **sources}
        return files

    def names_below(self, prefix: str) -> list[str]:
        return [name for name in self._source if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A tensor's shape by the file's header; None if there is no such tensor."""
        return self._source[name].shapes[name] if name in self._source else None

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._source[name].path

    def check(self, name: str, shape: tuple[int, ...] | None = None) -> None:
        """Check a tensor without reading it (see `read`)."""
        where = ", ".join(str(path) for path in self.paths)
        if name not in self._source:
            raise CheckpointError(f"tensor {name} is missing in {where}")
        source = self._source[name]
        if shape is not None and source.shapes[name] != tuple(shape):
            raise CheckpointError(
                f"tensor {name} must be {list(shape)} by config.json, but is "
                f"{list(source.shapes[name])} in {where}"
            )
        if (dtype := source.dtypes[name]) not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"tensor {name} in {source.path} has dtype {dtype}, which is not supported"
            )

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read a floating-point tensor to the CPU, in the file's dtype.

        Args:
            name: name of the tensor.
            shape: the expected shape; None to accept any.

        Raises:
            CheckpointError: the tensor is missing, or its shape or dtype is wrong.
        """
        self.check(name, shape)
        return self._source[name].read(name)


class TensorSource(Protocol):
    """Tensors by name, each with its shape, dtype and the file that it is read from."""

    path: Path
    names: list[str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | str]

    def read(self, name: str) -> Tensor: ...


def _open(path: Path) -> TensorSource:
    if path.suffix == ".gguf":
        from vox_serve.gguf_tensors import GgufTensors  # which imports this module

        return GgufTensors(path)
    if path.suffix in PICKLED:
        from vox_serve.pickled_tensors import PickledTensors  # which imports this module

        return PickledTensors(path)
    return _Safetensors(path)


def is_finite(tensor: Tensor) -> bool:
    """True if a floating-point tensor holds no NaN and no infinity: one pass, on all threads."""
    if not tensor.numel():
        return True
    # NaN is both the least and the largest value.
    return all(math.isfinite(value) for value in torch.stack(torch.aminmax(tensor)).tolist())


def refuse_not_finite(name: str, tensor: Tensor, path: Path, source: Tensor | None = None) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Args:
        name: name of the tensor.
        tensor: its values as they are used.
        path: the file that holds it.
        source: its values in the file, if these were converted.

    Raises:
        CheckpointError: a value is not finite.
    """
    if is_finite(tensor):
        return
    if source is not None and is_finite(source):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"tensor {name} in {path} has values beyond the range of {dtype}")
    raise CheckpointError(f"tensor {name} in {path} holds NaN or infinity")


MAPPED_BYTES = 2**26
"""A file is mapped again after so many bytes were read: if it stayed mapped, its pages would in the
end occupy memory next to the weights read from it. Mapping it for every tensor would read its
header as often."""


class _Safetensors:
    """A safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        try:
            check_header(path)
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    tensor = file.get_slice(name)
                    self.shapes[name] = tuple(tensor.get_shape())
                    dtype = tensor.get_dtype()
                    self.dtypes[name] = DTYPE_NAMES.get(dtype, dtype)
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None
        self.names = list(self.shapes)
        self._file: Any = None
        self._mapped_bytes = 0

    def read(self, name: str) -> Tensor:
        if self._file is None or self._mapped_bytes >= MAPPED_BYTES:
            self._file, self._mapped_bytes = safe_open(self.path, framework="pt"), 0
        tensor: Tensor = self._file.get_tensor(name)
        self._mapped_bytes += tensor.nbytes
        return tensor


def check_header(path: Path) -> None:
    """Bound the length of a safetensors file's header; the library checks the rest.

    Raises:
        OSError: the file cannot be read.
        ValueError: the header is too long, or the file is a pipe or a device.
    """
    refuse_special(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    # Where the length is beyond the file's end, the library's message says more.
    if MAX_HEADER_BYTES < length <= path.stat().st_size:
        raise ValueError(f"its header is longer than {MAX_HEADER_BYTES} bytes")
