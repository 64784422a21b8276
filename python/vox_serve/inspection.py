"""Finds out what a model is from config.json and the headers of its files, without loading it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from vox_serve.adapter_config import CONFIG_FILE
from vox_serve.checkpoint import (
    ADAPTER_FILE,
    PICKLE_FILE,
    CheckpointError,
    TensorFiles,
    is_codec_file,
    shard_names,
    weights_entry,
)
from vox_serve.checkpoint_layouts import find_csm, inferred_settings, refuse_other_weights
from vox_serve.checkpoint_sizes import check_sizes
from vox_serve.context_file import DEFAULT_PROMPTS
from vox_serve.gguf_header import GgufHeader, parse_header
from vox_serve.gguf_names import is_crispasr
from vox_serve.gguf_settings import gguf_settings
from vox_serve.gguf_tokenizer import has_tokenizer
from vox_serve.hub import GGUF_SUFFIX
from vox_serve.json_file import MAX_JSON_BYTES, parse_json
from vox_serve.model_config import CsmConfig
from vox_serve.tensor_names import HF, MLX
from vox_serve.weight_headers import WeightHeader, stored_bytes

_ADAPTER_KEYS = (
    "base_model_name_or_path",
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "use_dora",
)
_PICKLED = (".pt", ".pth", ".bin")
_MAX_SHARDS = 1000


class ModelPlace(Protocol):
    """A folder or repository.

    Attributes:
        name: as the user gave it.
        file: the one file of it that is meant; None for all.
        sizes: bytes of each file by its path below the folder; None if unknown.
    """

    name: str
    file: str | None
    sizes: dict[str, int | None]

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading from its start; raises an OSError if it cannot be read."""
        ...


@dataclass
class Inspection:
    """The facts about one model.

    Attributes:
        name: as the user gave it.
        kind: "csm", "adapter", "codec", "pickle" or "other".
        what: the kind and format in words.
        files: the weight files.
        config: the model's sizes, if it is a CSM whose sizes fit its tensors.
        stored: bytes of the model's weights by their type in the files.
        codec_stored: the same of a codec in the same files.
        tokenizer: the file that holds it; None if there is none.
        codec: the file that holds it; None if there is none.
        prompts: the folder has recordings of two speakers, which are the default context.
        adapter: settings of an adapter.
        problems: why it cannot be loaded as it is; one line each.
        notes: what loading it needs from elsewhere; one line each.
    """

    name: str
    kind: str = "other"
    what: str = ""
    files: list[str] = field(default_factory=list)
    config: CsmConfig | None = None
    stored: dict[str, int] = field(default_factory=dict)
    codec_stored: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None
    codec: str | None = None
    prompts: bool = False
    adapter: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same as values of JSON."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def inspect_model(place: ModelPlace) -> Inspection:
    """Find out what a model is.

    Raises:
        OSError, ValueError: a file cannot be read; one line names it and says why.
    """
    found = Inspection(place.name)
    settings = _json(place, "config.json")
    gguf, headers = None, []
    entry = place.file or weights_entry(settings, place.sizes)
    ggufs = [name for name in place.sizes if name.endswith(GGUF_SUFFIX) and "/" not in name]
    if entry is None and len(ggufs) == 1:
        entry = ggufs[0]
    pickled = entry if entry and entry.endswith(_PICKLED) else None
    if entry is not None and (pickled or is_codec_file(entry)):
        entry = None
    if entry is not None and entry.endswith(GGUF_SUFFIX):
        gguf, header = _gguf(place, entry)
        headers = [header]
        settings = gguf_settings(Path(entry), gguf, settings)
    elif entry is not None and entry != ADAPTER_FILE:
        headers = _safetensors(place, entry)
    found.files = [str(header.path) for header in headers]
    found.stored = stored_bytes(headers, codec=False)
    found.codec_stored = stored_bytes(headers, codec=True)
    if headers:
        _csm(found, settings, headers, gguf)
    elif CONFIG_FILE in place.sizes:
        _adapter(found, place)
    elif len(ggufs) > 1:
        found.what = "GGUF files: give one of " + ", ".join(sorted(ggufs)[:8])
    elif pickled or PICKLE_FILE in place.sizes:
        name = pickled or PICKLE_FILE
        found.kind, found.what = "pickle", f"a checkpoint in {name}"
        found.problems.append(
            f"{name} is a pickle file: it is not opened here, and --allow_pickle loads it"
        )
    elif settings.get("model_type") == "mimi" or any(map(is_codec_file, place.sizes)):
        found.kind, found.what = "codec", "a Mimi codec, for --codec"
    else:
        found.what = "nothing that is known: no weights in safetensors, GGUF or ckpt.pt"
    if found.kind == "csm":
        _parts(found, place, gguf)
    return found


def _csm(
    found: Inspection,
    settings: Mapping[str, Any],
    headers: list[WeightHeader],
    gguf: GgufHeader | None,
) -> None:
    """Fill in what the headers tell."""
    files = TensorFiles.of(headers)
    tensors = find_csm(files)
    if tensors is None:
        found.what = _other(settings, files, gguf)
        if settings.get("model_type") == "mimi":
            found.kind, found.what = "codec", "a Mimi codec, for --codec"
        return
    files, names = tensors
    found.kind = "csm"
    theirs = "MLX's names" if names is MLX else "Sesame's original names"
    theirs = "transformers' names" if names is HF else theirs
    if gguf is None:
        found.what = f"CSM in safetensors, {theirs}"
    elif is_crispasr(gguf.tensors):
        found.what = "CSM in GGUF, CrispASR's names"
    else:
        found.what = f"CSM in GGUF, {theirs} (csm.rs)"
        if "Q4_K" in found.stored:
            found.notes.append(
                "Q4_K blocks of csm.rs' own scripts/quantize.py are refused when they are loaded"
            )
    try:
        if not settings:
            settings = inferred_settings(Path(found.name), files)
            flavors = f"{settings['backbone_flavor']} and {settings['decoder_flavor']}"
            found.notes.append(f"no config.json: its tensors have the sizes of {flavors}")
        refuse_other_weights(files, names, settings)
        config = CsmConfig.from_json(settings)
        if config.has_spaced_prompts:
            found.what = found.what.replace("CSM", "MisoTTS", 1)
        check_sizes(files, names, config, settings)
        found.config = config
    except ValueError as error:
        found.problems.append(str(error))


def _other(settings: Mapping[str, Any], files: TensorFiles, gguf: GgufHeader | None) -> str:
    """A description of a file that has no CSM's tensors, in its own words."""
    if gguf is not None:
        kind = gguf.metadata.get("general.architecture")
        said = f"architecture {kind!r}" if isinstance(kind, str) else "no architecture"
        hint = ""
        if "token_embd.weight" in gguf.tensors:
            hint = "; llama.cpp divides CSM into a file for each transformer, which is not read"
        return f"no CSM: a GGUF file with {said}{hint}"
    kind = settings.get("model_type")
    said = f"model_type {kind!r} in config.json" if isinstance(kind, str) else "another model"
    return f"no CSM: {said}, {len(files.names)} tensors"


def _adapter(found: Inspection, place: ModelPlace) -> None:
    settings = _json(place, CONFIG_FILE)
    found.kind = "adapter"
    found.adapter = {key: settings.get(key) for key in _ADAPTER_KEYS}
    base = settings.get("base_model_name_or_path")
    found.what = f"a {settings.get('peft_type', 'LORA')} adapter of {base}"
    if ADAPTER_FILE in place.sizes:
        headers = _safetensors(place, ADAPTER_FILE)
        found.files, found.stored = [ADAPTER_FILE], stored_bytes(headers, codec=False)
    else:
        found.problems.append(f"{ADAPTER_FILE} is missing")
    found.notes.append(f"it speaks with its base model only: {base}")


def _parts(found: Inspection, place: ModelPlace, gguf: GgufHeader | None) -> None:
    """The parts that a CSM needs beside its two transformers."""
    weights = found.files[0]
    if "tokenizer.json" in place.sizes:
        found.tokenizer = "tokenizer.json"
    elif gguf is not None and has_tokenizer(gguf.metadata):
        found.tokenizer = weights
    else:
        found.problems.append(
            "no tokenizer: put the tokenizer.json of sesame/csm-1b, which is Llama 3.2's, beside "
            "it, or give --tokenizer"
        )
    codecs = [name for name in place.sizes if "/" not in name and is_codec_file(name)]
    if found.codec_stored:
        found.codec = weights
    elif codecs:
        found.codec = sorted(codecs)[0]
    else:
        found.notes.append("no Mimi codec: it comes from --codec, which is kyutai/mimi by default")
    found.prompts = all(name in place.sizes for name, _ in DEFAULT_PROMPTS)
    if not found.prompts:
        found.notes.append(
            "no recordings of speakers 0 and 1: without --context or a voice, the voice is the "
            "model's choice"
        )


def _json(place: ModelPlace, name: str) -> dict[str, Any]:
    """A JSON file's object; {} if there is none."""
    if name not in place.sizes:
        return {}
    with place.open(name) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"it is longer than {MAX_JSON_BYTES} bytes")
        value = parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} must hold a JSON object")
    return value


def _gguf(place: ModelPlace, name: str) -> tuple[GgufHeader, WeightHeader]:
    size = place.sizes.get(name)
    try:
        with place.open(name) as file:
            header = parse_header(file, 2**62 if size is None else size)
        return header, WeightHeader.of_gguf(Path(name), header)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be read as GGUF: {error}") from None


def _safetensors(place: ModelPlace, entry: str) -> list[WeightHeader]:
    names = [entry]
    if entry.endswith(".json"):
        names = shard_names(_json(place, entry), entry)[:_MAX_SHARDS]
    headers = []
    for name in names:
        if name not in place.sizes:
            raise CheckpointError(f"{entry} names {name}, which does not exist")
        try:
            with place.open(name) as file:
                headers.append(WeightHeader.of_safetensors(Path(name), file, place.sizes[name]))
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be read as safetensors: {error}") from None
    return headers
