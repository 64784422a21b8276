"""Every setting, declared once.

Flags, environment variables, bounds and the documentation's table all come from `Config`'s
fields. A value is taken from its flag, else from `VOX_SERVE_<FIELD>`, else it is the default.
`python -m vox_serve.config` prints the table.
"""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

ENV_PREFIX = "VOX_SERVE_"
MODEL, SAMPLING, SERVER = "model", "sampling", "server"
GROUPS = {
    MODEL: "model",
    SAMPLING: "sampling (a request may override each of these)",
    SERVER: "server",
}


class ConfigError(ValueError):
    """A setting has a value that it cannot take; the message names the setting."""


@dataclass(frozen=True)
class Setting:
    """What is known of a setting beside its name, type and default.

    Attributes:
        group: one of `GROUPS`.
        help: one sentence, without a full stop.
        low, high: inclusive bounds; None is unbounded.
        above: exclusive lower bound.
        choices: all values that it may take; empty when any will do.
        shown_default: how to write the default, where its value says little.
        shown_limits: how to write the bounds, where their values say little.
    """

    group: str
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    shown_default: str | None = None
    shown_limits: str | None = None

    @property
    def limits(self) -> str:
        """The bounds in words; empty if there are none."""
        if self.shown_limits:
            return self.shown_limits
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.above is not None:
            return f"above {self.above}, at most {self.high}"
        return "" if self.low is None else f"from {self.low} to {self.high}"

    def admits(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )


def setting(default: Any, group: str, help: str, **limits: Any) -> Any:
    """A field of `Config`; `limits` are `Setting`'s other attributes."""
    return field(default=default, metadata={"setting": Setting(group, help, **limits)})


@dataclass(frozen=True)
class Config:
    """The settings of `vox-serve` and `say`.

    Raises:
        ConfigError: a value has the wrong type or is out of its bounds.
    """

    model: str = setting(
        "demo", MODEL, "built-in voice, local folder, or hub id such as sesame/csm-1b"
    )
    codec: str = setting(
        "kyutai/mimi",
        MODEL,
        "folder, file or hub id of the Mimi codec, for a checkpoint that holds none",
    )
    context: str | None = setting(
        None,
        MODEL,
        "context.json whose segments come before every text; 'none' for no context",
        shown_default="the model's own prompts, if it has any",
    )
    device: str = setting(
        "auto", MODEL, "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    backend: str = setting(
        "auto",
        MODEL,
        "what runs the ops; auto takes the first of these that has an op, or VOXKERN_BACKEND's",
        choices=("auto", "native", "triton", "reference"),
    )
    dtype: str = setting(
        "auto",
        MODEL,
        "of weights and KV cache; auto is bfloat16, but float32 for a tiny model on a CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    quantize: str = setting(
        "none",
        MODEL,
        "packed weights; int4 keeps the heads in int8; both round the codec's decoder",
        choices=("none", "int8", "int4"),
    )
    weight_cache: str | None = setting(
        None,
        MODEL,
        "folder where packed weights are kept, to be mapped into memory by later starts; 'none' "
        "packs them at every start",
        shown_default=".voxkern in the model's folder, else in ~/.cache/voxkern; none if small",
    )
    num_threads: int | None = setting(
        None,
        MODEL,
        "CPU threads of the kernels",
        low=1,
        high=1024,
        shown_default="all that this process may use",
    )
    allow_pickle: bool = setting(
        False, MODEL, "read .pt checkpoints too (tensors only, never code)"
    )

    temperature: float = setting(
        0.9, SAMPLING, "randomness of the draw; 0 is greedy", low=0, high=100
    )
    top_k: int = setting(
        50,
        SAMPLING,
        "codes kept, the most likely first; 0 keeps all",
        low=0,
        high=2**31 - 1,
        shown_limits="0 or more",
    )
    top_p: float = setting(1.0, SAMPLING, "probability mass kept", above=0, high=1)
    min_p: float = setting(
        0.0, SAMPLING, "least probability of a code, as a share of the largest", low=0, high=1
    )
    repetition_penalty: float = setting(
        1.0, SAMPLING, "CTRL's penalty, on codebook 0; 1 is none", low=0.01, high=100
    )
    repetition_window: int = setting(
        16, SAMPLING, "frames back that the penalty looks", low=1, high=2048
    )
    seed: int | None = setting(
        None,
        SAMPLING,
        "same seed, same speech",
        low=-(2**63),
        high=2**63 - 1,
        shown_limits="a signed 64-bit integer",
        shown_default="a new one for every request",
    )
    # 90 s, Sesame's own limit.
    max_frames: int = setting(
        1125, SAMPLING, "longest utterance, in frames of 80 ms", low=1, high=2048
    )

    host: str = setting("127.0.0.1", SERVER, "address to listen on")
    port: int = setting(8000, SERVER, "port to listen on; 0 takes a free one", low=0, high=65535)
    max_batch_size: int | None = setting(
        None,
        SERVER,
        "requests spoken at the same time",
        low=1,
        high=1024,
        shown_default="8; on a GPU 64, or as many as half of its free memory holds",
    )
    max_queue_size: int = setting(
        64, SERVER, "requests that may wait; more are answered 503", low=0, high=100_000
    )
    max_body_bytes: int = setting(
        262_144, SERVER, "longest request body; a longer one is answered 413", low=1024, high=2**30
    )
    log_level: str = setting(
        "info", SERVER, "what is logged", choices=("error", "warning", "info", "debug")
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None and is_optional(item):
                continue
            expected = base_type(item)
            if expected is float and type(value) is int:
                object.__setattr__(self, item.name, float(value))
            elif type(value) is not expected:
                raise ConfigError(f"{item.name} must be {_TYPE_WORDS[expected]}, got {value!r}")
            if not setting_of(item).admits(value):
                raise ConfigError(f"{item.name} must be {setting_of(item).limits}, got {value}")

    @property
    def sampling(self) -> dict[str, Any]:
        """`SamplingParams`' fields, by name."""
        in_group = (item.name for item in fields(self) if setting_of(item).group == SAMPLING)
        return {name: getattr(self, name) for name in in_group if name != "max_frames"}

    @classmethod
    def resolve(cls, given: Mapping[str, Any], environ: Mapping[str, str]) -> "Config":
        """The config of flags `given` by field name, then of environment variables.

        Raises:
            ConfigError: see the class; for a variable the message names it.
        """
        values = {}
        for item in fields(cls):
            variable = ENV_PREFIX + item.name.upper()
            if item.name in given:
                values[item.name] = given[item.name]
            elif environ.get(variable):
                try:
                    values[item.name] = parse_value(item, environ[variable])
                except ConfigError as error:
                    raise ConfigError(f"environment variable {variable}: {error}") from None
        return cls(**values)


_TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def setting_of(item: Field) -> Setting:
    return item.metadata["setting"]


def is_optional(item: Field) -> bool:
    return isinstance(item.type, types.UnionType)


def base_type(item: Field) -> type:
    """The field's type, without `| None`."""
    return typing.get_args(item.type)[0] if is_optional(item) else item.type


def parse_value(item: Field, text: str) -> Any:
    """A setting's value from a flag's or a variable's text.

    Raises:
        ConfigError: it is of another type, or out of bounds. The message does not name the field.
    """
    kind = base_type(item)
    try:
        value = _BOOLEANS[text.strip().lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"expected {_TYPE_WORDS[kind]}, got {text!r}") from None
    if not setting_of(item).admits(value):
        raise ConfigError(f"must be {setting_of(item).limits}, got {text}")
    return value


def shown_default(item: Field) -> str:
    """The default, as documentation writes it."""
    text = setting_of(item).shown_default or str(item.default)
    return text.lower() if base_type(item) is bool else text


def markdown_table() -> str:
    """All settings as one Markdown table."""
    lines = ["| flag | default | values | what it does |", "| --- | --- | --- | --- |"]
    for item in fields(Config):
        about = setting_of(item)
        default = about.shown_default or f"`{shown_default(item)}`"
        values = about.limits or _TYPE_WORDS[base_type(item)]
        lines.append(f"| `--{item.name}` | {default} | {values} | {about.help} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
