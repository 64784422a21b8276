"""Finds out whether launch can load a model that was inspected, without loading its values."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vox_serve.checkpoint import CODEC_PREFIX, is_codec_file
from vox_serve.context_file import DEFAULT_PROMPTS
from vox_serve.gguf_tensors import PLAIN_TYPES, GgufTensors
from vox_serve.hub import GGUF_SUFFIX, resolve_model
from vox_serve.inspected_files import ModelPlace, safetensors_headers
from vox_serve.mimi import mimi_from_checkpoint
from vox_serve.mimi.config import MimiConfig
from vox_serve.model_costs import FRAMES_PER_S
from vox_serve.model_files import folder_of, prompt_builder
from vox_serve.recording import read_audio
from vox_serve.weight_headers import WeightHeader
from vox_serve.weights import open_checkpoint

if TYPE_CHECKING:
    from vox_serve.inspection import Inspection


def codec_file(settings: Mapping[str, Any], place: ModelPlace) -> str | None:
    """The file of a Mimi codec in a folder or repository; None without one.

    Args:
        settings: config.json, parsed; empty to look no further than names that mark a codec.
        place: the folder or repository.
    """
    if place.file is not None and is_codec_file(place.file):
        return place.file
    found = sorted(name for name in place.sizes if "/" not in name and is_codec_file(name))
    if settings.get("model_type") == "mimi" and "model.safetensors" in place.sizes:
        found.append("model.safetensors")
    return found[0] if found else None


def check_loading(
    found: "Inspection",
    place: ModelPlace,
    settings: Mapping[str, Any],
    headers: Sequence[WeightHeader],
) -> None:
    """Add the problem that launch would find, if there is one and none is known.

    Of a local model everything is read as launch reads it, but the values of the weights. Of one on
    the hub, only headers were read.
    """
    try:
        if found.problems:
            return
        if found.kind in ("csm", "codec"):
            _check_codec(found, place, settings, headers)
        if found.kind == "csm" and place.path is not None:
            _check_local(resolve_model(place.name))
        is_gguf = bool(headers) and headers[0].path.suffix == GGUF_SUFFIX
        kinds = {*found.stored, *found.codec_stored}
        if is_gguf and not kinds <= PLAIN_TYPES and find_spec("gguf") is None:
            found.problems.append("its blocks need the package gguf: pip install 'voxkern[gguf]'")
    except (OSError, RuntimeError, ValueError) as error:  # torch refuses shapes by RuntimeError
        found.problems.append(str(error))


def _check_codec(
    found: "Inspection",
    place: ModelPlace,
    settings: Mapping[str, Any],
    headers: Sequence[WeightHeader],
) -> None:
    """Check a codec's tensors and settings; their values are on no device."""
    if found.codec is None:
        return
    if found.codec_stored:
        shapes = {
            name.removeprefix(CODEC_PREFIX): header.shapes[name]
            for header in headers
            for name in header.names
            if name.startswith(CODEC_PREFIX)
        }
    else:
        shapes = safetensors_headers(place, found.codec)[0].shapes
    is_codec = settings.get("model_type") == "mimi"
    config = settings if is_codec else settings.get("codec_config")
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    codec = mimi_from_checkpoint(tensors, config, device="meta")
    num_codebooks = codec.config.num_codebooks
    if found.config is not None and num_codebooks < found.config.num_codebooks:
        found.problems.append(
            f"the codec has {num_codebooks} codebooks, the model {found.config.num_codebooks}"
        )


def _check_local(model: Path) -> None:
    """Read a local CSM as launch does, up to the values of its weights.

    Raises:
        OSError, ValueError: launch could not load it; one line says why.
    """
    opened = open_checkpoint(model)
    for source in opened.files.sources:
        if isinstance(source, GgufTensors):
            for name in source.rounded:  # a row tells blocks that cannot be decoded
                source.rows(name, 0, 1)
    prompt_builder(model, opened.config)
    prompts = [folder_of(model) / name for name, _ in DEFAULT_PROMPTS]
    if all(path.is_file() for path in prompts):
        max_s = opened.config.backbone.max_positions / FRAMES_PER_S
        for path in prompts:
            read_audio(path, MimiConfig.sample_rate_hz, max_s)
