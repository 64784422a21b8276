"""The sizes of a Mimi codec, read from transformers' config keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vox_serve.json_file import shown

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")

# Bounds on sizes that the tensors' shapes do not determine, or not before memory is allocated.
_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 64
_MAX_CONTEXT = 4096  # of a convolution, in blocks
_MAX_FRAME_SAMPLES = 2**20
_MIN_RATE_HZ = 100
_MAXIMA = {
    "sample_rate_hz": 384_000,
    "sliding_window": 4096,
    "hidden_size": 8192,
    "num_quantizers": 1024,
}
_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    tuple: "a list",
}


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
        self._check_types()
        sizes = (
            "sample_rate_hz hidden_size num_filters kernel_size last_kernel_size"
            " residual_kernel_size dilation_growth_rate compress codebook_size codebook_dim"
            " num_quantizers num_semantic_quantizers intermediate_size num_attention_heads"
            " num_key_value_heads head_dim sliding_window"
        )
        for name in sizes.split():
            most = _MAXIMA.get(name, _MAX_SIZE)
            is_size = 1 <= getattr(self, name) <= most
            _require(is_size, name, getattr(self, name), f"at least 1 and at most {most}")
        for name in ("num_residual_layers", "num_hidden_layers"):
            is_count = 0 <= getattr(self, name) <= _MAX_LAYERS
            _require(is_count, name, getattr(self, name), f"at least 0 and at most {_MAX_LAYERS}")
        ratios = self.upsampling_ratios
        are_strides = 1 <= len(ratios) <= _MAX_LAYERS and all(
            isinstance(ratio, int) and 1 <= ratio <= _MAX_SIZE for ratio in ratios
        )
        are_strides = are_strides and math.prod(ratios) <= _MAX_FRAME_SAMPLES
        _require(
            are_strides,
            "upsampling_ratios",
            ratios,
            f"strides of at least 1, together at most {_MAX_FRAME_SAMPLES}",
        )
        _require(
            self.sample_rate_hz >= _MIN_RATE_HZ,
            "sampling_rate",
            self.sample_rate_hz,
            f"at least {_MIN_RATE_HZ}",
        )
        _require(1e-12 <= self.norm_eps <= 1, "norm_eps", self.norm_eps, "from 1e-12 to 1")
        _require(1 <= self.rope_theta <= 1e12, "rope_theta", self.rope_theta, "from 1 to 1e12")
        context = self.dilation_growth_rate ** max(self.num_residual_layers - 1, 0)
        _require(
            context * self.residual_kernel_size <= _MAX_CONTEXT,
            "dilation_growth_rate",
            self.dilation_growth_rate,
            f"a context of at most {_MAX_CONTEXT} blocks with num_residual_layers = "
            f"{self.num_residual_layers}",
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
        _require(
            self.frame_rate_hz is None or 0.01 <= self.frame_rate_hz <= self.sample_rate_hz,
            "frame_rate",
            self.frame_rate_hz,
            "at least 0.01 and at most sampling_rate",
        )
        _require(
            self.latent_stride >= 1 and self.frame_samples <= _MAX_FRAME_SAMPLES,
            "frame_rate",
            self.frame_rate_hz,
            f"a codec frame rate, with at most {_MAX_FRAME_SAMPLES} samples in a frame",
        )
        if self.resamples:
            _require(
                self.upsample_groups >= 1 and self.hidden_size % self.upsample_groups == 0,
                "upsample_groups",
                self.upsample_groups,
                f"a divisor of hidden_size = {self.hidden_size}",
            )

    def _check_types(self) -> None:
        """Check each field's type: a JSON file may give any."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "frame_rate_hz":
                is_number = value is None or _is_number(value)
                _require(is_number, "frame_rate", value, "a finite number")
                continue
            kind = type(field.default)
            holds = _is_number(value) if kind is float else type(value) is kind
            _require(holds, field.name, value, _KINDS[kind])

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
        _require(isinstance(rope, Mapping), "rope_parameters", rope, "an object")
        ratios = get("upsampling_ratios") or cls.upsampling_ratios
        _require(isinstance(ratios, list | tuple), "upsampling_ratios", ratios, "a list")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        _require(rope_type == "default", "rope_type", rope_type, "'default'")

        hidden_size = get("hidden_size", cls.hidden_size)
        num_heads = get("num_attention_heads", cls.num_attention_heads)
        # Wrong types are named below, when the fields are checked.
        are_sizes = type(hidden_size) is int and type(num_heads) is int and num_heads > 0
        default_head_dim = hidden_size // num_heads if are_sizes else cls.head_dim
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
            "upsampling_ratios": tuple(ratios),
            "codebook_dim": vector_dim,
            "num_quantizers": get("num_quantizers", get("num_codebooks", cls.num_quantizers)),
            "head_dim": get("head_dim") or default_head_dim,
            "rope_theta": rope.get("rope_theta", get("rope_theta", cls.rope_theta)),
            "has_encoder": settings.get("encoder_config", ...) is not None,
        }
        plain = set(cls.__dataclass_fields__) - set(special)
        given: dict[str, Any] = {name: get(name) for name in plain if get(name) is not None}
        return cls(**special, **given)


def _require(holds: bool, name: str, value: object, expected: object) -> None:
    if not holds:
        name = {"sample_rate_hz": "sampling_rate"}.get(name, name)
        raise ValueError(f"Mimi config: {name} is {shown(value)}, supported is {expected}")


def _is_number(value: object) -> bool:
    """True for a finite number; false for a bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e300
