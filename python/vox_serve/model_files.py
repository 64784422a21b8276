"""A model's files: a folder with config.json and safetensors, or a GGUF file in a folder."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vox_serve.checkpoint import PICKLE_FILE, CheckpointError, read_json, weights_entry
from vox_serve.checkpoint_settings import read_settings
from vox_serve.gguf_header import read_header
from vox_serve.gguf_settings import gguf_settings
from vox_serve.gguf_tokenizer import has_tokenizer, tokenizer_json
from vox_serve.hub import GGUF_SUFFIX
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import PromptBuilder


def gguf_of(model: Path) -> Path | None:
    """The GGUF file that holds a model's weights; None if other files do.

    Args:
        model: a GGUF file, or a folder. Safetensors and pickle files in a folder come first.

    Raises:
        CheckpointError: a folder has no other weights but several GGUF files.
    """
    if not model.is_dir():
        return model if model.suffix == GGUF_SUFFIX else None
    names = [path.name for path in model.iterdir()]
    if not any(name.endswith(GGUF_SUFFIX) for name in names):
        return None
    found = gguf_entries(read_json(model / "config.json") if "config.json" in names else {}, names)
    if not found:
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{model} has {len(found)} GGUF files: give the path of one, such as {model / found[0]}"
        )
    return model / found[0]


def gguf_entries(config: Mapping[str, Any], files: Iterable[str]) -> list[str]:
    """The GGUF files of a folder whose weights are in no other files (see `weights_entry`)."""
    files = list(files)
    if PICKLE_FILE in files or weights_entry(config, files) is not None:
        return []
    return sorted(name for name in files if name.endswith(GGUF_SUFFIX) and "/" not in name)


def folder_of(model: Path) -> Path:
    """The folder that holds a model's tokenizer, prompts and codec."""
    return model if model.is_dir() else model.parent


def model_settings(model: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """A model's settings: its config.json, or those of its GGUF file (see `gguf_settings`), or what
    the shapes of its tensors tell.

    Args:
        model: a folder or a GGUF file.
        allow_pickle: pickled weights may be read.

    Raises:
        CheckpointError: a file is missing or cannot be read; the message names it.
    """
    gguf, config = gguf_of(model), folder_of(model) / "config.json"
    if gguf is None:
        return read_settings(model, allow_pickle)
    return gguf_settings(gguf, read_header(gguf), read_json(config) if config.is_file() else {})


@contextmanager
def naming_settings(model: Path) -> Iterator[None]:
    """Where settings come from a GGUF file, errors about config.json name that file instead."""
    try:
        yield
    except ValueError as error:
        gguf = gguf_of(model)
        if gguf is None or (gguf.parent / "config.json").exists():
            raise
        said = str(error).replace("config.json", f"{gguf} (no config.json beside it)", 1)
        raise CheckpointError(said) from None


def model_config(model: Path, allow_pickle: bool = False) -> CsmConfig:
    """A model's sizes; see `model_settings`.

    Raises:
        ValueError: they are missing or unsupported; one line names the file and key.
    """
    settings = model_settings(model, allow_pickle)
    with naming_settings(model):
        return CsmConfig.from_json(settings)


def prompt_builder(model: Path, config: CsmConfig) -> PromptBuilder:
    """The model's tokenizer: its folder's tokenizer.json, else that in its GGUF file.

    Raises:
        CheckpointError: there is none, or it does not fit the model.
    """
    folder, gguf = folder_of(model), gguf_of(model)
    if gguf is None or (folder / "tokenizer.json").is_file():
        return PromptBuilder.from_folder(folder, config)
    metadata = read_header(gguf).metadata
    if not has_tokenizer(metadata):
        raise CheckpointError(
            f"{gguf} holds no tokenizer: put the tokenizer.json of sesame/csm-1b, which is Llama "
            f"3.2's, into {folder}"
        )
    try:
        data = tokenizer_json(metadata)
    except ValueError as error:
        raise CheckpointError(f"{gguf}: {error}") from None
    return PromptBuilder.from_bytes(data, config, str(gguf), model_settings(model))
