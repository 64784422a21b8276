"""Settings of a CSM in a GGUF file, with the keys of transformers' config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vox_serve.checkpoint import CODEC_PREFIX, CheckpointError
from vox_serve.gguf_header import GgufHeader
from vox_serve.gguf_names import Place, is_crispasr, places
from vox_serve.mimi.checkpoint import codec_settings

_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Scaling of CSM's rotary frequencies, which no known file stores. sesame/csm-1b's config.json has
the same frequencies in other numbers."""

_BACKBONE = {
    "csm.backbone.n_layers": "num_hidden_layers",
    "csm.backbone.d_model": "hidden_size",
    "csm.backbone.n_heads": "num_attention_heads",
    "csm.backbone.n_kv_heads": "num_key_value_heads",
    "csm.backbone.head_dim": "head_dim",
    "csm.backbone.ff_dim": "intermediate_size",
    "csm.backbone.max_pos": "max_position_embeddings",
    "csm.backbone.rope_theta": "rope_theta",
    "csm.backbone.rms_norm_eps": "rms_norm_eps",
    "csm.bos_token_id": "bos_token_id",
}
_DEPTH = {
    "csm.depth.n_layers": "num_hidden_layers",
    "csm.depth.d_model": "hidden_size",
    "csm.depth.n_heads": "num_attention_heads",
    "csm.depth.n_kv_heads": "num_key_value_heads",
    "csm.depth.head_dim": "head_dim",
    "csm.depth.ff_dim": "intermediate_size",
}
_SHARED = ("rope_theta", "rms_norm_eps")
"""Settings that CrispASR stores for the backbone only."""


def gguf_settings(path: Path, header: GgufHeader, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file's model.

    Those of a config.json beside the file come first. CrispASR's metadata have the others. csm.rs
    stores no more than sizes that the tensors' shapes have too: without a config.json the model has
    CSM-1B's two transformers.

    Args:
        path: the file, for messages.
        header: its header.
        beside: config.json, parsed; empty without one.

    Raises:
        CheckpointError: the file's tensors are contradictory.
    """
    try:
        found = places(header.tensors)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from None
    settings = _sizes(found)
    if is_crispasr(header.tensors):
        settings |= _metadata(header.metadata)
        settings |= _codec(path, header, found)
    return settings | dict(beside)


def _sizes(found: Mapping[str, Place]) -> dict[str, int]:
    """The vocabularies by the tensors' shapes, with keys that both formats of config.json have.

    CrispASR's metadata have them too, but as the converter's defaults if it found no key.
    """
    sizes = {}
    for key, names, more in (
        ("text_vocab_size", ("embed_text_tokens.weight", "text_embeddings.weight"), 0),
        ("vocab_size", ("lm_head.weight", "codebook0_head.weight"), 0),
        # Codebook 0 has a head of its own.
        ("num_codebooks", ("depth_decoder.codebooks_head.weight", "audio_head"), 1),
    ):
        for name in names:
            if name in found and found[name].shape:
                sizes[key] = found[name].shape[0] + more
    return sizes


def _metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """CrispASR's metadata."""
    backbone = {name: metadata[key] for key, name in _BACKBONE.items() if key in metadata}
    depth = {name: metadata[key] for key, name in _DEPTH.items() if key in metadata}
    depth |= {name: backbone[name] for name in _SHARED if name in backbone}
    for part in (backbone, depth):
        part["rope_scaling"] = dict(_ROPE)
    return {"model_type": "csm", **backbone, "depth_decoder_config": depth}


def _codec(path: Path, header: GgufHeader, found: Mapping[str, Place]) -> dict[str, Any]:
    """The codec's settings by its tensors' shapes, and by the one number that these do not have."""
    shapes = {
        name.removeprefix(CODEC_PREFIX): place.shape
        for name, place in found.items()
        if name.startswith(CODEC_PREFIX)
    }
    if not shapes:
        return {}
    heads = header.metadata.get("csm.mimi.n_heads", 8)
    try:
        if not isinstance(heads, int) or heads < 1:
            raise ValueError(f"csm.mimi.n_heads must be a whole number of at least 1, got {heads}")
        return {"codec_config": codec_settings(shapes, heads)}
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
