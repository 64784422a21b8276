"""Finds out what a model is from config.json and the headers of its files, without loading it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vox_serve.adapter_config import CONFIG_FILE, AdapterConfig
from vox_serve.adapter_tensors import stranger
from vox_serve.checkpoint import (
    ADAPTER_FILE,
    ADAPTER_PICKLE,
    PICKLED,
    CheckpointError,
    TensorFiles,
    is_codec_file,
    only_pickled,
    pickled_entry,
    weights_entry,
)
from vox_serve.checkpoint_layouts import find_csm, inferred_settings, refuse_other_weights
from vox_serve.checkpoint_sizes import check_sizes
from vox_serve.context_file import DEFAULT_PROMPTS
from vox_serve.gguf_header import GgufHeader
from vox_serve.gguf_names import is_crispasr
from vox_serve.gguf_settings import gguf_settings
from vox_serve.gguf_tokenizer import has_tokenizer
from vox_serve.hub import GGUF_SUFFIX
from vox_serve.inspected_files import ModelPlace, gguf_header, json_object, safetensors_headers
from vox_serve.inspection_checks import check_loading, codec_file
from vox_serve.model_config import CsmConfig
from vox_serve.model_files import gguf_entries
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
    settings = json_object(place, "config.json")
    gguf, headers, pickled = None, [], None
    entry = place.file or weights_entry(settings, place.sizes)
    ggufs = gguf_entries(settings, place.sizes)
    if entry is None and len(ggufs) == 1:
        entry = ggufs[0]
    elif entry is None and not ggufs:
        pickled = pickled_entry(place.sizes)
    elif entry is not None and entry.endswith(PICKLED):
        pickled, entry = entry, None
    if entry is not None and is_codec_file(entry):
        entry = None
    if entry is not None and entry.endswith(GGUF_SUFFIX):
        gguf, header = gguf_header(place, entry)
        headers = [header]
        settings = gguf_settings(Path(entry), gguf, settings)
    elif entry is not None and entry != ADAPTER_FILE:
        headers = safetensors_headers(place, entry)
    found.files = [str(header.path) for header in headers]
    found.stored = stored_bytes(headers, codec=False)
    found.codec_stored = stored_bytes(headers, codec=True)
    if headers:
        _csm(found, settings, headers, gguf, "config.json" in place.sizes)
    elif CONFIG_FILE in place.sizes:
        _adapter(found, place)
    elif len(ggufs) > 1:
        found.what = "GGUF files: give one of " + ", ".join(ggufs[:8])
        found.problems.append("it has several models")
    elif pickled:
        found.kind, found.what = "pickle", f"a checkpoint in {pickled}"
        how = "--allow_pickle loads it" if place.path else "it is not downloaded"
        found.problems.append(f"{pickled} is a pickle file: it is not opened here, and {how}")
    elif codec := codec_file(settings, place):
        found.kind, found.what, found.codec = "codec", "a Mimi codec, for --codec", codec
    else:
        found.what = "nothing that is known: no weights in safetensors, GGUF or a pickle file"
        found.problems.append("it has no weights")
    if found.kind == "csm":
        _parts(found, place, gguf)
    check_loading(found, place, settings, headers)
    return found


def _csm(
    found: Inspection,
    settings: Mapping[str, Any],
    headers: list[WeightHeader],
    gguf: GgufHeader | None,
    has_settings: bool,
) -> None:
    """Fill in what the headers tell."""
    files = TensorFiles.of(headers)
    tensors = find_csm(files)
    if tensors is None and settings.get("model_type") == "mimi":
        found.kind, found.what = "codec", "a Mimi codec, for --codec"
        found.codec = found.files[0]
    if tensors is None:
        found.what = found.what or _other(settings, files, gguf)
        found.problems += [] if found.codec else ["it is no CSM"]
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
        if not has_settings and gguf is None:
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
    settings = json_object(place, CONFIG_FILE)
    found.kind = "adapter"
    found.adapter = {key: settings.get(key) for key in _ADAPTER_KEYS}
    base = settings.get("base_model_name_or_path")
    found.what = f"a {settings.get('peft_type', 'LORA')} adapter of {base}"
    if ADAPTER_FILE in place.sizes:
        headers = safetensors_headers(place, ADAPTER_FILE)
        found.files, found.stored = [ADAPTER_FILE], stored_bytes(headers, codec=False)
        if name := stranger(headers[0].names):
            found.problems.append(f"tensor {name} belongs to no part of a CSM")
    elif ADAPTER_PICKLE in place.sizes:
        found.problems.append(f"it {only_pickled(ADAPTER_PICKLE)}")
    else:
        found.problems.append(f"{ADAPTER_FILE} is missing")
    try:
        AdapterConfig.parse(Path(CONFIG_FILE), settings)
    except CheckpointError as error:
        found.problems.append(str(error))
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
    found.codec = weights if found.codec_stored else codec_file({}, place)
    if found.codec is None:
        found.notes.append("no Mimi codec: it comes from --codec, which is kyutai/mimi by default")
    found.prompts = all(name in place.sizes for name, _ in DEFAULT_PROMPTS)
    if not found.prompts:
        found.notes.append(
            "no recordings of speakers 0 and 1: without --context or a voice, the voice is the "
            "model's choice"
        )
