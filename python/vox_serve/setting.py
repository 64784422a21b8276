"""A setting: its type, its bounds, and the words for both in messages and in the documentation."""

import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

TYPE_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_BOUND_ERRORS = (
    "literal_error",
    "finite_number",
    "greater_than",
    "greater_than_equal",
    "less_than_equal",
)


class ConfigError(ValueError):
    """A setting has an invalid value; the message names the setting."""


@dataclass(frozen=True)
class Shown:
    """Documentation text for a default, or for bounds, whose value says little."""

    default: str | None = None
    limits: str | None = None


@dataclass(frozen=True)
class Secret:
    """Marks a setting whose value no message shows, and whose variable may not be empty."""


def setting(default: Any, description: str, **bounds: Any) -> Any:
    """A field of `Settings`; bounds are `ge`, `gt` and `le`."""
    return Field(default, description=description, **bounds)


class Settings(BaseModel):
    """A frozen group of settings that takes exact types: `port="80"` is an error.

    Raises:
        ConfigError: an unknown setting, a wrong type, or a value out of bounds.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    title: ClassVar[str]

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as errors:
            error = errors.errors()[0]
            name = str(error["loc"][0])
            if name not in type(self).model_fields:
                raise ConfigError(f"{name} is not a setting") from None
            field = type(self).model_fields[name]
            raise ConfigError(reason(f"{name} must be", field, error)) from None

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        fields = type(self).model_fields
        return [
            (name, value)
            for name, value in super().__repr_args__()
            if not (name in fields and is_secret(fields[name]))
        ]


def base_type(field: FieldInfo) -> Any:
    """The field's type without `| None`: str, int, float, bool or a Literal."""
    kind = field.annotation
    return typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind


def choices(field: FieldInfo) -> tuple[str, ...]:
    """All values that the field takes; empty when it is not a Literal."""
    kind = base_type(field)
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def bound(field: FieldInfo, kind: Literal["ge", "gt", "le"]) -> Any:
    """The field's lower bound, exclusive lower bound or upper bound; None if there is none."""
    return next((getattr(item, kind) for item in field.metadata if hasattr(item, kind)), None)


def limits(field: FieldInfo) -> str:
    """The bounds in words; empty if there are none."""
    low, above, high = bound(field, "ge"), bound(field, "gt"), bound(field, "le")
    if words := shown(field).limits:
        return words
    if choices(field):
        return f"one of {', '.join(choices(field))}"
    if above is not None:
        return f"above {above}, at most {high}"
    return "" if low is None else f"from {low} to {high}"


def shown_default(field: FieldInfo) -> str:
    """The default as the documentation writes it."""
    text = shown(field).default or str(field.default)
    return text.lower() if base_type(field) is bool else text


def shown(field: FieldInfo) -> Shown:
    """The documentation text of a setting."""
    return next((item for item in field.metadata if isinstance(item, Shown)), Shown())


def is_secret(field: FieldInfo) -> bool:
    """True if no message shows the setting's value."""
    return any(isinstance(item, Secret) for item in field.metadata)


def reason(must_be: str, field: FieldInfo, error: Any) -> str:
    """The message of a pydantic error, from `must_be` on."""
    if error["type"] in _BOUND_ERRORS:
        return f"{must_be} {limits(field)}, got {error['input']}"
    given = "" if is_secret(field) else f", got {error['input']!r}"
    return f"{must_be} {TYPE_WORDS[base_type(field)]}{given}"
