"""The sizes of a CSM, read from a checkpoint's config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vox_serve.json_file import shown

MAX_POSITIONS = 2**18
"""Longest context of a model: its table of rotary angles takes up to 1 MiB per channel of a head.
Keys and values are bounded by the machine's memory (`loading`)."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the low rotary frequencies.

    Source: Dubey et al. 2024, https://arxiv.org/abs/2407.21783, and its published model code.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class TransformerConfig:
    """One Llama-style transformer: pre-norm, rotary grouped-query attention, SwiGLU.

    Raises:
        ValueError: the sizes are inconsistent.
    """

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused q, k and v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def rope_table(self) -> Tensor:
        """Cosines and sines of every position.

        Computed in float32 and in transformers' order of operations: different rounding would
        occasionally change a greedy code.

        Returns:
            `[max_positions, head_dim]` float32, cosines in the first half of a row.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        frequencies = 1.0 / (self.rope_theta**exponents)
        if scaling := self.rope_scaling:
            frequencies = _scaled_frequencies(frequencies, scaling)
        positions = torch.arange(self.max_positions, dtype=torch.float32)
        angles = positions[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=1)


def _scaled_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide the frequencies of long wavelengths by the factor, keep short ones, blend between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_max_positions / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    is_long = wavelengths > scaling.original_max_positions / low
    is_short = wavelengths < scaling.original_max_positions / high
    kept = torch.where(is_short, frequencies, blended)
    return torch.where(is_long, frequencies / scaling.factor, kept)


@dataclass(frozen=True)
class CsmConfig:
    """The sizes of CSM's two transformers and its vocabularies.

    `num_codebooks` is K and `audio_vocab_size` V: a code of codebook k is row `k * V + code` of an
    audio table. `follows_context` is False for a model that was trained on single utterances and
    speaks badly after others: it gets no context but its own default. `num_speakers` is the number
    of speakers that a request may name, from 0 on. With `has_spaced_prompts` a prompt is written
    `[0] text`, as MisoTTS was trained, instead of CSM's `[0]text`. `max_part_chars` is the
    longest text that the model speaks well at once, in characters; None if that is not known.
    """

    backbone: TransformerConfig
    depth: TransformerConfig
    num_codebooks: int
    audio_vocab_size: int
    text_vocab_size: int
    follows_context: bool = True
    num_speakers: int = 2
    has_spaced_prompts: bool = False
    max_part_chars: int | None = None

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "CsmConfig":
        """Read config.json with transformers' keys or the original ones.

        Args:
            settings: the parsed JSON. If a key of transformers is missing, the original key is used
                (`backbone_flavor`, `decoder_flavor`, `audio_num_codebooks`, `audio_vocab_size`,
                `text_vocab_size`), then transformers' default. RoPE is the published model's if
                there are no transformers keys at all, or a flavor and no keys of RoPE.

        Raises:
            ValueError: a value is missing, invalid or unsupported; the message names the key.
        """
        num_codebooks = _whole(settings, "num_codebooks", "audio_num_codebooks", default=32)
        # Where both are given, as in conversions for MLX, vocab_size is that of the text.
        audio_vocab_size = _whole(settings, "audio_vocab_size", "vocab_size", default=2051)
        if num_codebooks < 2:
            raise ValueError(f"config.json: num_codebooks must be 2 or more, got {num_codebooks}")
        original = "backbone_flavor" in settings or not any(key in settings for key in _HF_KEYS)
        depth_settings = settings.get("depth_decoder_config") or {}
        if not isinstance(depth_settings, Mapping):
            raise ValueError("config.json: depth_decoder_config must be an object")
        if "backbone_config" in settings:
            raise ValueError(
                "config.json: backbone_config is of csm-hf, which preceded transformers' CSM and "
                "is not supported"
            )
        backbone = _transformer(
            settings, "", _flavor(settings, "backbone_flavor", "llama-1B"), 2048, original
        )
        depth = _transformer(
            depth_settings,
            "depth_decoder_config.",
            _flavor(settings, "decoder_flavor", "llama-100M"),
            # The depth decoder needs one position per codebook, whatever its config says.
            max(33, num_codebooks),
            original,
            min_positions=num_codebooks,
        )
        in_depth = {"num_codebooks": num_codebooks, "backbone_hidden_size": backbone.dim}
        if settings.get("audio_vocab_size") is None:
            in_depth["vocab_size"] = audio_vocab_size
        for key, expected in in_depth.items():
            if (value := depth_settings.get(key, expected)) != expected:
                raise ValueError(
                    f"config.json: depth_decoder_config.{key} is {shown(value)}, but the model "
                    f"around it has {expected}"
                )
        return cls(
            backbone,
            depth,
            num_codebooks,
            audio_vocab_size,
            _whole(settings, "text_vocab_size", default=128256),
            follows_context=settings.get("follows_context") is not False,
            num_speakers=_whole(settings, "num_speakers", default=2),
            has_spaced_prompts=_has_spaced_prompts(settings),
            max_part_chars=_whole(settings, "max_part_chars", default=0) or None,
        )


_ROPE_KEYS = ("rope_scaling", "rope_theta", "rope_parameters")
_HF_KEYS = (
    "architectures",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "depth_decoder_config",
    *_ROPE_KEYS,
)

FLAVORS = {
    "llama-1B": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    },
    "llama-100M": {
        "num_hidden_layers": 4,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 8192,
    },
    "llama-8B": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "llama-300M": {
        "num_hidden_layers": 8,
        "hidden_size": 1536,
        "num_attention_heads": 24,
        "num_key_value_heads": 6,
        "intermediate_size": 6912,
    },
}
"""Sizes of transformers by the names that the original models' code has for them: of CSM-1B and of
MisoTTS 8B."""

_MISO = {"backbone_flavor": "llama-8B", "model_type": "miso_tts"}
"""Values of config.json by which MisoTTS is recognised."""

# Fixed in the original's code for both transformers: Llama 3.2's values.
_ROPE_THETA = 500_000.0
_MAX_THETA = 1e12
_MAX_FACTOR = 1e6  # of RoPE's scaling
_ROPE_SCALING = RopeScaling(32.0, 1.0, 4.0, 8192)

_SUPPORTED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


def _flavor(settings: Mapping[str, Any], key: str, default: str) -> dict[str, int]:
    name = settings.get(key, default)
    if not isinstance(name, str) or name not in FLAVORS:
        known = " or ".join(FLAVORS)
        raise ValueError(f"config.json: {key} must be {known}, got {shown(name)}")
    return FLAVORS[name]


def _has_spaced_prompts(settings: Mapping[str, Any]) -> bool:
    """MisoTTS, or what config.json says: `"spaced_prompts": true`."""
    value = settings.get("spaced_prompts")
    if value is None:
        return any(settings.get(key) == miso for key, miso in _MISO.items())
    if not isinstance(value, bool):
        raise ValueError(f"config.json: spaced_prompts must be true or false, got {shown(value)}")
    return value


def _transformer(
    settings: Mapping[str, Any],
    where: str,
    flavor: dict[str, int],
    default_positions: int,
    original: bool,
    min_positions: int = 1,
) -> TransformerConfig:
    for key, supported in _SUPPORTED.items():
        if (value := settings.get(key, supported[0])) not in supported:
            raise ValueError(f"config.json: {where}{key} = {shown(value)} is not supported")
    sizes = {key: _whole(settings, key, where=where, default=flavor[key]) for key in flavor}
    heads = sizes["num_attention_heads"]
    if settings.get("head_dim") is None and heads > sizes["hidden_size"]:
        raise ValueError(
            f"config.json: {where}num_attention_heads is {heads}, but hidden_size is "
            f"{sizes['hidden_size']}"
        )
    if settings.get("num_key_value_heads", heads) is None:
        sizes["num_key_value_heads"] = heads
    positions = _whole(
        settings,
        "max_position_embeddings",
        where=where,
        default=default_positions,
        at_most=MAX_POSITIONS,
    )
    scaling: RopeScaling | None
    if original and not any(key in settings for key in _ROPE_KEYS):
        theta, scaling = _ROPE_THETA, _ROPE_SCALING
    else:
        theta, scaling = _rope(settings, where, positions)
    try:
        return TransformerConfig(
            num_layers=sizes["num_hidden_layers"],
            dim=sizes["hidden_size"],
            num_heads=heads,
            num_kv_heads=sizes["num_key_value_heads"],
            head_dim=_whole(
                settings, "head_dim", where=where, default=sizes["hidden_size"] // heads
            ),
            ffn_dim=sizes["intermediate_size"],
            norm_eps=_number(settings, "rms_norm_eps", where, 1e-5, at_most=1),
            max_positions=max(positions, min_positions),
            rope_theta=theta,
            rope_scaling=scaling,
        )
    except ValueError as error:
        raise ValueError(f"{error} (config.json, {where or 'the backbone'})") from None


def _rope(
    settings: Mapping[str, Any], where: str, positions: int
) -> tuple[float, RopeScaling | None]:
    """RoPE in either spelling: `rope_parameters`, or `rope_scaling` and `rope_theta`."""
    key = "rope_scaling" if settings.get("rope_scaling") else "rope_parameters"
    rope = settings.get(key) or {}
    where = f"{where}{key}."
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: {where[:-1]} must be an object")
    theta = _number(
        {**settings, **rope}, "rope_theta", where, _ROPE_THETA, at_least=1, at_most=_MAX_THETA
    )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"config.json: {where}partial_rotary_factor is not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json: {where}rope_type = {shown(kind)} is not supported")
    factor = _number(rope, "factor", where, at_least=1, at_most=_MAX_FACTOR)
    low = _number(rope, "low_freq_factor", where, at_most=_MAX_FACTOR)
    high = _number(rope, "high_freq_factor", where, at_most=_MAX_FACTOR)
    if low >= high:
        raise ValueError(
            f"config.json: {where}high_freq_factor must be above low_freq_factor = {low}, "
            f"got {high}"
        )
    return theta, RopeScaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=_whole(
            rope, "original_max_position_embeddings", where=where, default=positions
        ),
    )


def _whole(
    settings: Mapping[str, Any],
    *keys: str,
    where: str = "",
    default: int,
    at_most: int = 2**31 - 1,
) -> int:
    """The value of the first key that is present and not null: an integer of at least 1."""
    for key in keys:
        value = settings.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
            raise ValueError(
                f"config.json: {where}{key} must be a whole number from 1 to {at_most}, got "
                f"{shown(value)}"
            )
        return value
    return default


def _number(
    settings: Mapping[str, Any],
    key: str,
    where: str,
    default: float | None = None,
    *,
    at_least: float = 0,
    at_most: float,
) -> float:
    """The value of a key, a finite number above 0 within bounds; the default if it is null."""
    value = settings.get(key)
    if value is None and default is not None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (at_least <= value <= at_most and value > 0)  # NaN fails too
    ):
        bounds = f"from {at_least:g} to" if at_least else "above 0 and up to"
        raise ValueError(
            f"config.json: {where}{key} must be a number {bounds} {at_most:g}, got {shown(value)}"
        )
    return float(value)
