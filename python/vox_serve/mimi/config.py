"""The sizes of a Mimi codec, read from transformers' config keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")


@dataclass(frozen=True)
class MimiConfig:
    """Sizes of the codec; the defaults are those of `kyutai/mimi`.

    Fields are named as in transformers' `MimiConfig`, except `sample_rate_hz`, `frame_rate_hz` and
    `has_encoder`.

    Raises:
        ValueError: a field has an unsupported value; the message names it.
    """

    sample_rate_hz: int = 24_000
    frame_rate_hz: float | None = None  # None: two steps of the transformers per frame
    hidden_size: int = 512
    num_filters: int = 64
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    compress: int = 2
    use_conv_shortcut: bool = False
    pad_mode: str = "constant"
    upsample_groups: int = 512
    codebook_size: int = 2048
    codebook_dim: int = 256
    num_quantizers: int = 32
    num_semantic_quantizers: int = 1
    num_hidden_layers: int = 8
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    sliding_window: int = 250
    attention_bias: bool = False
    has_encoder: bool = True

    def __post_init__(self) -> None:
        sizes = (
            "sample_rate_hz hidden_size num_filters kernel_size last_kernel_size"
            " residual_kernel_size dilation_growth_rate compress codebook_size codebook_dim"
            " num_quantizers num_semantic_quantizers intermediate_size num_attention_heads"
            " num_key_value_heads head_dim sliding_window"
        )
        for name in sizes.split():
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_residual_layers", "num_hidden_layers"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        ratios = self.upsampling_ratios
        _require(
            bool(ratios) and min(ratios) >= 1, "upsampling_ratios", ratios, "strides of at least 1"
        )
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads = {self.num_attention_heads}",
        )
        _require(
            self.num_semantic_quantizers < self.num_quantizers,
            "num_semantic_quantizers",
            self.num_semantic_quantizers,
            f"less than num_quantizers = {self.num_quantizers}",
        )
        pad_modes = ("constant", "replicate")
        _require(self.pad_mode in pad_modes, "pad_mode", self.pad_mode, f"one of {pad_modes}")
        _require(
            self.hidden_act in ACTIVATIONS, "hidden_act", self.hidden_act, f"one of {ACTIVATIONS}"
        )
        _require(self.latent_stride >= 1, "frame_rate", self.frame_rate_hz, "a codec frame rate")
        if self.resamples:
            _require(
                self.hidden_size % self.upsample_groups == 0,
                "upsample_groups",
                self.upsample_groups,
                f"a divisor of hidden_size = {self.hidden_size}",
            )

    @property
    def hop_samples(self) -> int:
        """Samples per step of the transformers."""
        return math.prod(self.upsampling_ratios)

    @property
    def _rates_hz(self) -> tuple[int, float]:
        steps_hz = math.ceil(self.sample_rate_hz / self.hop_samples)
        return steps_hz, self.frame_rate_hz or self.sample_rate_hz / (2 * self.hop_samples)

    @property
    def latent_stride(self) -> int:
        """Steps of the transformers per frame."""
        steps_hz, frames_hz = self._rates_hz
        return int(steps_hz / frames_hz)

    @property
    def resamples(self) -> bool:
        """True if frames and steps have different rates; a convolution then resamples."""
        steps_hz, frames_hz = self._rates_hz
        return steps_hz != frames_hz

    @property
    def frame_samples(self) -> int:
        """Samples per frame: 1920 for `kyutai/mimi`."""
        return self.hop_samples * self.latent_stride

    @property
    def num_codebooks(self) -> int:
        return self.num_quantizers

    @property
    def has_quantizer_projections(self) -> bool:
        return self.codebook_dim != self.hidden_size

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "MimiConfig":
        """Read a `config.json` of transformers' Mimi (or the `codec_config` of a CSM).

        Args:
            settings: the parsed JSON; missing keys default to `kyutai/mimi`'s values, keys that do
                not affect inference are ignored.

        Raises:
            ValueError: a value is unsupported; the message names the key.
        """
        get = {key: value for key, value in settings.items() if value is not None}.get
        for name, only in (
            ("use_causal_conv", True),
            ("trim_right_ratio", 1.0),
            ("audio_channels", 1),
        ):
            _require(get(name, only) == only, name, get(name), only)
        _require(
            "decoder_config" not in settings or settings["decoder_config"] is not None,
            "decoder_config",
            None,
            "present: a codec without a decoder cannot speak",
        )
        rope = get("rope_parameters") or get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        _require(rope_type == "default", "rope_type", rope_type, "'default'")

        hidden_size = get("hidden_size", cls.hidden_size)
        num_heads = get("num_attention_heads", cls.num_attention_heads)
        vector_dim = get("vector_quantization_hidden_dimension", cls.codebook_dim)
        _require(
            settings.get("codebook_dim", vector_dim) in (vector_dim, None),
            "codebook_dim",
            settings.get("codebook_dim"),
            f"vector_quantization_hidden_dimension = {vector_dim}",
        )
        special: dict[str, Any] = {
            "sample_rate_hz": get("sampling_rate", cls.sample_rate_hz),
            "frame_rate_hz": get("frame_rate", get("_frame_rate")),
            "upsampling_ratios": tuple(get("upsampling_ratios") or cls.upsampling_ratios),
            "codebook_dim": vector_dim,
            "num_quantizers": get("num_quantizers", get("num_codebooks", cls.num_quantizers)),
            "head_dim": get("head_dim") or hidden_size // num_heads,
            "rope_theta": rope.get("rope_theta", get("rope_theta", cls.rope_theta)),
            "has_encoder": settings.get("encoder_config", ...) is not None,
        }
        plain = set(cls.__dataclass_fields__) - set(special)
        given: dict[str, Any] = {name: get(name) for name in plain if get(name) is not None}
        return cls(**special, **given)


def _require(holds: bool, name: str, value: object, expected: object) -> None:
    if not holds:
        raise ValueError(f"Mimi config: {name} is {value!r}, supported is {expected}")
