"""Finds the weight files in a checkpoint folder and reads tensors from them.

Nothing is unpickled unless the caller allows it, and then only plain tensors.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Files that hold only the codec; never mistaken for the model.
CODEC_FILE_PATTERNS = ("mimi.safetensors", "tokenizer-*.safetensors")
PICKLE_FILE = "ckpt.pt"
CODEC_PREFIX = "codec_model."

_INDEX_SUFFIX = ".safetensors.index.json"
_USUAL_FILES = (f"transformers{_INDEX_SUFFIX}", f"model{_INDEX_SUFFIX}", "model.safetensors")


class CheckpointError(ValueError):
    """An invalid checkpoint; the message is one line that names the file or tensor."""


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that must hold a JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
    rest = [name for name in rest if not is_codec_file(name)]
    return rest[0] if len(rest) == 1 else None


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
        if PICKLE_FILE in files and allow_pickle:
            return [folder / PICKLE_FILE]
        if PICKLE_FILE in files:
            raise CheckpointError(
                f"{folder} has only {PICKLE_FILE}, a pickle file: allow pickle files explicitly if "
                "you trust it, or convert it to safetensors"
            )
        raise CheckpointError(f"{folder} has no weights: expected {', '.join(_USUAL_FILES)}")
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
        paths: safetensors files, or one pickle file (`.pt`), which is opened with
            `weights_only=True`.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, paths: Iterable[Path]):
        self.paths = list(paths)
        self._source: dict[str, _Safetensors | _Pickled] = {}
        for path in self.paths:
            source = _Pickled(path) if path.suffix == ".pt" else _Safetensors(path)
            self._source |= dict.fromkeys(source.names, source)

    def __contains__(self, name: object) -> bool:
        return name in self._source

    @property
    def names(self) -> set[str]:
        return set(self._source)

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read a floating-point tensor to the CPU, in the file's dtype.

        Args:
            name: name of the tensor.
            shape: the expected shape; None to accept any.

        Raises:
            CheckpointError: the tensor is missing, or its shape or dtype is wrong.
        """
        where = ", ".join(str(path) for path in self.paths)
        if name not in self._source:
            raise CheckpointError(f"tensor {name} is missing in {where}")
        tensor = self._source[name].read(name)
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"tensor {name} must be {list(shape)} by config.json, but is "
                f"{list(tensor.shape)} in {where}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise CheckpointError(f"tensor {name} has dtype {tensor.dtype}, which is not supported")
        return tensor


class _Safetensors:
    """A safetensors file, mapped only while one of its tensors is in use.

    If it stayed mapped, its pages would in the end occupy memory next to the weights read from it.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None

    def read(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)


class _Pickled:
    """A pickled state dict."""

    def __init__(self, path: Path):
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # which errors torch.load raises depends on the bytes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} cannot be read as plain tensors: {reason}") from None
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{path} holds no dict of tensors")
        self._tensors = tensors
        self.names = [name for name, value in tensors.items() if isinstance(value, Tensor)]

    def read(self, name: str) -> Tensor:
        return self._tensors[name]
