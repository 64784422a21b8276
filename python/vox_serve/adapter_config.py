"""Reads the settings of a LoRA adapter: peft's adapter_config.json."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vox_serve.checkpoint import CheckpointError, read_json
from vox_serve.json_file import shown

CONFIG_FILE = "adapter_config.json"

MAX_RANK = 2**14
"""Highest rank of an adapter. A higher one than the width of the matrices has no use."""
MAX_PATTERNS = 1000
"""Most entries of rank_pattern or alpha_pattern; CSM-1B has 150 matrices."""
MAX_EXPRESSIONS = 64
"""Most of them that are no plain names; each is tried on every matrix."""

T = TypeVar("T")

_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8  # peft's

_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "monteclora_config",
    "velora_config",
)
"""Settings with which the change of a matrix is no plain product of two matrices, or concerns
other things than matrices."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
"""Names of an `init_lora_weights` that leaves the base model as it is. With others, such as
"pissa", the adapter belongs to a base model that peft changed first."""

_NAME = re.compile(r"[\w.-]*", re.ASCII)
_ATOM = r"(?:\w|-|\.|\\[.dw-]|\[[\w.-]+\])"
_LITERALS = r"(?:\w|-|\.|\\\.)+"
_EXPRESSION = re.compile(
    rf"\^?(?:{_ATOM}[*+]?\??|\((?:\?:)?(?P<group>{_LITERALS}(?:\|{_LITERALS})*)\))+\$?"
)
_MAX_EXPRESSION_CHARS = 128
_MAX_REPEATS = 2


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that decide how an adapter is merged.

    Attributes:
        path: adapter_config.json.
        base: name of the base model; None if the file does not tell.
        rank, alpha: of the modules that no pattern names.
        ranks, alphas: pairs of an expression that a module's name must match, and its value; the
            first that matches counts.
        is_rank_stabilised: the scaling is alpha / sqrt(rank) rather than alpha / rank.
        targets: names of the adapted modules, or ends of them; None if the file has an expression.
    """

    path: Path
    base: str | None
    rank: int
    alpha: float
    ranks: Sequence[tuple[re.Pattern[str], int]]
    alphas: Sequence[tuple[re.Pattern[str], float]]
    is_rank_stabilised: bool
    targets: tuple[str, ...] | None

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Read the file of an adapter's folder.

        Raises:
            CheckpointError: it is missing or invalid, or the adapter is of a kind that cannot be
                merged; one line names the file and the setting.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {CONFIG_FILE}{_hint(folder)}")
        return cls.parse(path, read_json(path))

    @classmethod
    def parse(cls, path: Path, settings: Mapping[str, Any]) -> "AdapterConfig":
        """Check the file's settings; see `read`."""
        kind = settings.get("peft_type")
        if kind is None and ("fine_tune_type" in settings or "lora_parameters" in settings):
            raise CheckpointError(
                f"{path} is of an MLX adapter: fuse it with its base model, and give the result as "
                "--model"
            )
        if kind != "LORA":
            raise CheckpointError(f"{path}: peft_type must be 'LORA', got {shown(kind)}")
        for name in _REFUSED:
            if settings.get(name):
                raise CheckpointError(
                    f"{path}: {name} = {shown(settings[name])} is not supported: merge the adapter "
                    "with peft, and give the result as --model"
                )
        init = settings.get("init_lora_weights")
        if not (init is None or isinstance(init, bool) or init in _PLAIN_INITS):
            raise CheckpointError(
                f"{path}: init_lora_weights {shown(init)} changes the base model: merge the "
                "adapter with peft, and give the result as --model"
            )
        targets = settings.get("target_modules")
        base = settings.get("base_model_name_or_path")
        return cls(
            path=path,
            base=base if isinstance(base, str) and base else None,
            rank=_rank(path, "r", settings.get("r", _DEFAULT_RANK)),
            alpha=_number(path, "lora_alpha", settings.get("lora_alpha", _DEFAULT_ALPHA)),
            ranks=_patterns(path, settings, "rank_pattern", _rank),
            alphas=_patterns(path, settings, "alpha_pattern", _number),
            is_rank_stabilised=_flag(path, "use_rslora", settings.get("use_rslora")),
            targets=_targets(path, targets, settings),
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the base model."""
        return _first(self.ranks, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor of a module's change."""
        alpha, rank = _first(self.alphas, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank


def why_adapter(folder: Path) -> str | None:
    """The refusal of a folder given as a model that holds only an adapter; None if it does not.

    Args:
        folder: a folder without the weights of a model.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    try:
        base = AdapterConfig.read(folder).base
    except CheckpointError as error:
        return f"{folder} is an adapter, no model, and cannot be used: {error}"
    named = shown(base)[1:-1] if base else "its base model"
    return f"{folder} is a LoRA adapter, no model: give --model {named} --adapter {folder}"


def _hint(folder: Path) -> str:
    """The end of a message that tells what else a folder holds."""
    names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    if "config.json" in names:
        return ": it is a model: give it as --model"
    found = [name for name in names if (folder / name / CONFIG_FILE).is_file()]
    return f": its subfolder {found[-1]} has one" if found else ""


def _rank(path: Path, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise CheckpointError(
            f"{path}: {name} must be a whole number from 1 to {MAX_RANK}, got {shown(value)}"
        )
    return value


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        raise CheckpointError(f"{path}: {name} must be a number, got {shown(value)}")
    return value


def _flag(path: Path, name: str, value: object) -> bool:
    """A setting that is true or false, or null, which is false."""
    if not (value is None or isinstance(value, bool)):
        raise CheckpointError(f"{path}: {name} must be true or false, got {shown(value)}")
    return value is True


def _targets(path: Path, value: object, settings: Mapping[str, Any]) -> tuple[str, ...] | None:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        # With these, not all modules of such a name are adapted.
        chosen = ("layers_to_transform", "layers_pattern", "exclude_modules")
        return None if any(settings.get(name) for name in chosen) else tuple(value)
    if value is None or isinstance(value, str):
        return None
    raise CheckpointError(f"{path}: target_modules must be names, got {shown(value)}")


def _patterns(
    path: Path, settings: Mapping[str, Any], name: str, check: Callable[[Path, str, object], T]
) -> list[tuple[re.Pattern[str], T]]:
    """A setting with values by pattern, checked; the patterns match as in peft."""
    value = settings.get(name) or {}
    if not isinstance(value, Mapping) or len(value) > MAX_PATTERNS:
        raise CheckpointError(
            f"{path}: {name} must be an object of at most {MAX_PATTERNS} values, got {shown(value)}"
        )
    expressions = [key for key in value if not _NAME.fullmatch(key)]
    if len(expressions) > MAX_EXPRESSIONS or not all(map(_is_quick, expressions)):
        raise CheckpointError(
            f"{path}: {name} has {shown(expressions[-1])}, a regular expression that is not "
            "supported: give names of modules"
        )
    return [
        (re.compile(rf"(.*\.)?({key})$"), check(path, f"{name}[{shown(key)}]", item))
        for key, item in value.items()
    ]


def _is_quick(expression: str) -> bool:
    """True if an expression is simple enough to be matched quickly: for some, Python's engine takes
    a time that grows exponentially with their length."""
    found = _EXPRESSION.fullmatch(expression) if len(expression) <= _MAX_EXPRESSION_CHARS else None
    if found is None or len(re.findall(r"[*+?]", expression.replace("(?:", "("))) > _MAX_REPEATS:
        return False
    try:
        re.compile(expression)
    except re.error:  # a range such as [z-a]
        return False
    alternatives = (found["group"] or "").split("|")
    return expression.count("(") <= 1 and len(set(alternatives)) == len(alternatives)


def _first(values: Sequence[tuple[re.Pattern[str], T]], module: str, default: T) -> T:
    """The value of the first pattern that matches a module's name."""
    return next((value for pattern, value in values if pattern.match(module)), default)
