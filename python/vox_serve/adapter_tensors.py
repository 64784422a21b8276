"""The tensors of a LoRA adapter's file, by the tensors of the base model that they change."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vox_serve.adapter_config import CONFIG_FILE, AdapterConfig
from vox_serve.checkpoint import (
    ADAPTER_FILE,
    ADAPTER_PICKLE,
    CODEC_PREFIX,
    MLX_ADAPTER,
    CheckpointError,
    TensorFiles,
    only_pickled,
)
from vox_serve.json_file import shown
from vox_serve.model_config import CsmConfig
from vox_serve.tensor_keys import TABLES, is_matrix, tensor_keys
from vox_serve.tensor_names import FORMATS, TensorNames

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_WRAPPERS = ("_orig_mod", "module")
"""Parts of a name that torch.compile and data-parallel training add."""
_UNUSED = ("inv_freq", "audio_tokens_offsets")
"""Ends of names of buffers that some versions of transformers save."""


@dataclass(frozen=True)
class Change:
    """The change of one tensor of the base model, by names of the adapter's tensors.

    Attributes:
        a, b: factors of the product that is added; None for no product.
        scaling: factor of the product.
        value: the tensor that takes the place of the base model's; None to keep that.
    """

    a: str | None = None
    b: str | None = None
    scaling: float = 1.0
    value: str | None = None


class Adapter:
    """An adapter's file, sorted. Apart from the codec's factors, no tensor is read.

    Args:
        folder: the adapter's folder.
        config: the base model's sizes.
        allow_pickle: read adapter_model.bin (plain tensors only) if there is no safetensors file.

    Attributes:
        folder: the adapter's folder.
        path: the file of its tensors.
        files: the file's tensors.
        names: the format of the base model that the adapter was trained on.
        changes: the changes by key of `tensor_keys`.

    Raises:
        CheckpointError: a file is missing or invalid, or a tensor belongs to no part of a CSM.
    """

    def __init__(self, folder: Path, config: CsmConfig, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._settings = AdapterConfig.read(folder)
        self.files = TensorFiles([tensor_file(folder, allow_pickle)])
        self.path = self.files.paths[0]
        parts: dict[str, dict[str, str]] = defaultdict(dict)
        for name in sorted(self.files.names):
            module, kind = _parse(name)
            if module.rpartition(".")[2] in _UNUSED:
                continue
            if kind in parts[module]:
                raise CheckpointError(f"{self.path}: {parts[module][kind]} and {name} are the same")
            parts[module][kind] = name
        self._refuse_codec({m: parts.pop(m) for m in list(parts) if m.startswith(CODEC_PREFIX)})
        self.names, keys = _format(parts, config)
        self.changes: dict[str, Change] = {}
        for module, tensors in parts.items():
            if module not in keys:
                name = next(iter(tensors.values()))
                raise CheckpointError(f"{self.path}: tensor {name} belongs to no part of a CSM")
            change = self._change(module, tensors, keys[module][0])
            self.changes |= dict.fromkeys(keys[module], change)
        if not self.changes:
            raise CheckpointError(f"{self.path} changes no tensor of a CSM")
        self._refuse_missing(keys)

    @property
    def paths(self) -> list[Path]:
        """The adapter's files."""
        return [self.folder / CONFIG_FILE, self.path]

    def check(self, key: str, shape: Sequence[int]) -> None:
        """Check the shapes of a change against the shape of the tensor that it changes.

        Raises:
            CheckpointError: one does not fit; the message names the tensor.
        """
        change = self.changes[key]
        if change.value is not None:
            self._check_shape(change.value, list(shape))
        if change.a is None or change.b is None:
            return
        rank = self._settings.rank_of(_parse(change.a)[0])
        outs, ins = (shape[1], shape[0]) if key in TABLES else (shape[0], shape[1])
        self._check_shape(change.a, [rank, ins])
        self._check_shape(change.b, [outs, rank])

    def _check_shape(self, name: str, expected: list[int]) -> None:
        found = list(self.files.shape(name) or ())
        if found != expected:
            raise CheckpointError(
                f"{self.path}: tensor {name} must be {expected} by {CONFIG_FILE} and the base "
                f"model, but is {found}"
            )
        self.files.check(name)

    def _change(self, module: str, tensors: dict[str, str], key: str) -> Change:
        """The change of a module's tensors by their kinds."""
        value = tensors.pop("value", None)
        if not tensors:
            return Change(value=value)
        a, b = _FACTORS[2:] if key in TABLES else _FACTORS[:2]
        for kind, name in tensors.items():
            if kind not in (a, b) or not (key in TABLES or is_matrix(key)):
                raise CheckpointError(f"{self.path}: tensor {name} is not supported")
        for kind, other in ((a, b), (b, a)):
            if kind not in tensors:
                raise CheckpointError(f"{self.path}: {tensors[other]} has no {kind} beside it")
        return Change(tensors[a], tensors[b], self._settings.scaling_of(module), value)

    def _refuse_codec(self, modules: dict[str, dict[str, str]]) -> None:
        """Refuse changes of the codec. Trainers that adapt every module of a name, such as q_proj,
        write factors for the codec's too, but do not train them: one factor stays zero."""
        for tensors in modules.values():
            if set(tensors) <= {*_FACTORS} and any(
                not self.files.read(name).any() for name in tensors.values()
            ):
                continue
            name = next(iter(tensors.values()))
            raise CheckpointError(
                f"{self.path}: tensor {name} changes the codec, which is not supported"
            )

    def _refuse_missing(self, keys: dict[str, list[str]]) -> None:
        """Refuse an adapter that lacks a module of a name in `target_modules`."""
        for target in self._settings.targets or ():
            found = [m for m in keys if m == target or m.endswith(f".{target}")]
            for module in found:
                if not all(key in self.changes for key in keys[module]):
                    raise CheckpointError(
                        f"{self.path}: tensors of {module} are missing, which {CONFIG_FILE} has in "
                        f"target_modules ({shown(target)})"
                    )


def tensor_file(folder: Path, allow_pickle: bool = False) -> Path:
    """The file of an adapter's tensors.

    Raises:
        CheckpointError: there is none, or only a pickle file and `allow_pickle` is false.
    """
    path, pickled = folder / ADAPTER_FILE, folder / ADAPTER_PICKLE
    if path.is_file():
        return path
    if pickled.is_file() and allow_pickle:
        return pickled
    if pickled.is_file():
        raise CheckpointError(f"{folder} {only_pickled(ADAPTER_PICKLE)}")
    if (folder / MLX_ADAPTER).is_file():
        raise CheckpointError(
            f"{folder / MLX_ADAPTER} is of an MLX adapter: fuse it with its base model, and give "
            "the result as --model"
        )
    raise CheckpointError(f"{folder} has no {ADAPTER_FILE}")


def stranger(names: Iterable[str]) -> str | None:
    """The first of an adapter's tensors that no CSM has, whatever its number of layers; or None."""
    parts: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        module = re.sub(r"\blayers\.\d+\.", "layers.0.", _parse(name)[0])
        if module.rpartition(".")[2] not in _UNUSED and not module.startswith(CODEC_PREFIX):
            parts.setdefault(module, {"": name})
    _, keys = _format(parts, CsmConfig.from_json({}))
    return next((parts[module][""] for module in parts if module not in keys), None)


def _parse(name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and its kind: a factor, "value" or another name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    for wrapper in ("base_model", "model"):
        if parts[:1] == [wrapper]:
            parts.pop(0)
    for i, part in enumerate(parts):
        if part in _FACTORS:  # then perhaps the adapter's name, and "weight"
            end = parts[i + 1 :]
            is_factor = len(end) < 3 and end[-1:] != ["bias"]
            return ".".join(parts[:i]), part if is_factor else ".".join(parts[i:])
    if parts[-1:] == ["weight"]:
        parts.pop()
    for i, part in enumerate(parts):
        if part in ("base_layer", "modules_to_save"):
            parts = parts[:i]
            break
    return ".".join(parts), "value"


def _format(
    modules: dict[str, dict[str, str]], config: CsmConfig
) -> tuple[TensorNames, dict[str, list[str]]]:
    """The format with most of the modules' names, and its keys by module."""
    found = []
    for names in FORMATS:
        keys: dict[str, list[str]] = defaultdict(list)
        for key, name in tensor_keys(names, config).items():
            keys[name.removesuffix(".weight")].append(key)
        found.append((names, dict(keys)))
    return max(found, key=lambda pair: len(modules.keys() & pair[1].keys()))
