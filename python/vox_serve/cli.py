"""What the two commands share: flags from `Config`, errors in one line, the engine."""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic.fields import FieldInfo

from vox_serve.config import (
    Config,
    ConfigError,
    Settings,
    base_type,
    choices,
    limits,
    parse_value,
    shown_default,
)

if TYPE_CHECKING:
    from vox_serve.engine import Engine


MAX_MESSAGE_CHARS = 500


class CommandError(Exception):
    """A command cannot go on; the message is one line for its user.

    Attributes:
        code: the exit code that says so; 2 for a wrong flag.
    """

    code = 1


class WrongFlagError(CommandError):
    code = 2


class _OneSpelling(argparse.HelpFormatter):
    """Shows `--top_k K` where argparse would show `--top_k K, --top-k K`."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        spellings = [flag for flag in action.option_strings if "-" not in flag.removeprefix("--")]
        short = [flag for flag in action.option_strings if not flag.startswith("--")]
        names = ", ".join(dict.fromkeys([*short, *spellings]))
        if action.nargs == 0:
            return names
        return (
            f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )


class CommandParser(argparse.ArgumentParser):
    """An argument parser with `Config`'s flags; a wrong one is reported in one line, exit code 2.

    Args:
        prog: the command's name in messages.
        description: what it does.
        usage: the first line of `--help`.
        epilog: what follows the flags in `--help`.
    """

    def __init__(self, prog: str, description: str, usage: str, epilog: str | None = None):
        super().__init__(
            prog=prog,
            description=description,
            usage=usage,
            epilog=epilog,
            formatter_class=_OneSpelling,
            allow_abbrev=False,
        )

    def add_flag(self, name: str, **options: Any) -> None:
        """Add flag `--name`, with underscores and with dashes."""
        add_flag(self, name, **options)

    def add_settings(self, *groups: type[Settings]) -> None:
        """Add a flag for every setting in `groups`; one not given is absent from the namespace."""
        for group in groups:
            section = self.add_argument_group(group.title)
            for name, field in group.model_fields.items():
                add_flag(section, name, dest=name, **_flag_options(name, field))

    def parse(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
        """The command's own flags, and the config of the others and of the environment."""
        args = self.parse_args(argv)
        given = {name: value for name, value in vars(args).items() if name in Config.model_fields}
        try:
            return args, Config(**given)
        except ConfigError as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help lists the flags)\n")


def add_flag(parser: argparse._ActionsContainer, name: str, **options: Any) -> None:
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **options)


def _flag_options(name: str, field: FieldInfo) -> dict[str, Any]:
    if base_type(field) is bool:
        return {
            "default": argparse.SUPPRESS,
            "action": argparse.BooleanOptionalAction,
            "help": field.description,
        }

    def convert(text: str) -> Any:
        try:
            return parse_value(name, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    bounds = "" if choices(field) else limits(field)
    notes = [note for note in (bounds, f"default {shown_default(field)}") if note]
    return {
        "default": argparse.SUPPRESS,
        "type": convert,
        "metavar": "|".join(choices(field)) or name.rpartition("_")[2].upper(),
        "help": f"{field.description} [{'; '.join(notes)}]".replace("%", "%%"),
    }


def one_line(message: object) -> str:
    """The message without line breaks, printable whatever it holds, and not without end."""
    text = textwrap.shorten(str(message), MAX_MESSAGE_CHARS, placeholder=" ...")
    return text.encode("utf-8", "backslashreplace").decode()


def run_command(prog: str, command: Callable[[], int]) -> int:
    """Run a command's body, and turn whatever goes wrong into one line and an exit code.

    `VOX_SERVE_TRACEBACK=1` shows the traceback too.
    """
    # Otherwise torch's threads spin after each of the codec's ops and take the kernels' cores. It
    # is read when torch is loaded, which is the command's part.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return command()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("VOX_SERVE_TRACEBACK"):
            raise
        known = isinstance(error, CommandError | OSError | ValueError) and str(error)
        message = error if known else f"{type(error).__name__}: {error}"
        print(f"{prog}: error: {one_line(message)}", file=sys.stderr)
        return error.code if isinstance(error, CommandError) else 1


def engine_of(config: Config) -> "Engine":
    """The engine that the settings describe; sets the backend and the number of CPU threads too.

    Raises:
        WrongFlagError: the backend is not to be had.
        ValueError, OSError: the model, its codec or the context cannot be had; one line says why.
    """
    import torch

    import voxkern
    from vox_serve.loading import load_engine
    from voxkern.backend import why_missing

    force_backend(config)
    num_threads = config.num_threads
    if not why_missing("native", "cpu"):
        if num_threads is not None:
            voxkern.set_num_threads(num_threads)
        num_threads = voxkern.num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return load_engine(**dict(config))


def force_backend(config: Config) -> None:
    """Have the backend of the settings, else that of VOXKERN_BACKEND, serve every op.

    Raises:
        WrongFlagError: it serves no device of the settings; the message says why.
    """
    import torch

    from voxkern import backend

    if config.backend != "auto":
        backend.force(config.backend)
    name = backend.forced()
    devices = [config.device]
    if config.device == "auto":
        devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    reasons = [backend.why_missing(name, device) for device in devices] if name else [None]
    if all(reasons):
        asked = "VOXKERN_BACKEND=" if config.backend == "auto" else "--backend "
        raise WrongFlagError(f"{asked}{name}: {'; '.join(dict.fromkeys(reasons))}")
