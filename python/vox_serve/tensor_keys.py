"""Names of the same tensors in the formats of CSM checkpoints."""

from vox_serve.model_config import CsmConfig
from vox_serve.tensor_names import TensorNames

TABLES = ("text_table", "audio_table", "depth_audio_table")
"""Keys of the embeddings."""

_WHOLE = (*TABLES, "code0_head", "projection", "code_heads")
"""Attributes of `TensorNames` that name one tensor."""


def tensor_keys(names: TensorNames, config: CsmConfig) -> dict[str, str]:
    """The tensors of a checkpoint by keys that are the same in all formats.

    Args:
        names: the format.
        config: the model's sizes.

    Returns:
        Names of tensors by key, such as `text_table`, `backbone.norm` and `depth.3.q`. The two
        audio tables have the same name in a format with one.
    """
    keys = {key: getattr(names, key) for key in _WHOLE}
    for part, prefix, layers in (
        ("backbone", names.backbone, config.backbone.num_layers),
        ("depth", names.depth, config.depth.num_layers),
    ):
        keys[f"{part}.norm"] = f"{prefix}{names.norm}"
        for i in range(layers):
            for key, name in names.layer.items():
                keys[f"{part}.{i}.{key}"] = f"{prefix}layers.{i}.{name}"
    return keys


def is_matrix(key: str) -> bool:
    """True if a tensor is the matrix of a linear layer."""
    return not key.endswith("norm") and key not in (*TABLES, "code_heads")


def rotary_width(key: str, config: CsmConfig) -> int | None:
    """Width of a head for q and k, whose rows form rotary pairs; None for other tensors."""
    part, _, rest = key.partition(".")
    if rest.rpartition(".")[2] not in ("q", "k"):
        return None
    return (config.backbone if part == "backbone" else config.depth).head_dim
