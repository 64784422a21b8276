"""Helpers that all commands share: flags made from `Config`, and one-line errors."""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pydantic.fields import FieldInfo

from vox_serve.config import Config, ConfigError, parse_value
from vox_serve.console import discard_stdout, stdout_is_broken
from vox_serve.setting import Settings, base_type, choices, limits, shown_default

MAX_MESSAGE_CHARS = 500
_MAX_SCANNED_CHARS = 10_000  # of a message that may quote megabytes


class CommandError(Exception):
    """A command cannot continue; the message is one line for its user."""


class _OneSpelling(argparse.HelpFormatter):
    """Shows `--top_k K` where argparse would show `--top_k K, --top-k K`; also for `--no-..`."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        spellings = [
            flag
            for flag in action.option_strings
            if "-" not in flag.removeprefix("--").removeprefix("no-")
        ]
        short = [flag for flag in action.option_strings if not flag.startswith("--")]
        names = ", ".join(dict.fromkeys([*short, *spellings]))
        if action.nargs == 0:
            return names
        return (
            f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )


class CommandParser(argparse.ArgumentParser):
    """A parser of a command's own flags and of `Config`'s. It exits on an error: one line, code 2.

    Args:
        prog: the command's name in messages.
        description: shown above the flags in `--help`.
        usage: first line of `--help`.
        epilog: shown below the flags in `--help`.
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
        """Add a flag for every setting in `groups`. A flag not given sets no attribute."""
        for group in groups:
            section = self.add_argument_group(group.title)
            for name, field in group.model_fields.items():
                add_flag(section, name, dest=name, **_flag_options(name, field))

    def parse(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
        """Parse `argv`; returns the flags, and the config made from them and the environment."""
        args = self.parse_args(argv)
        given = {name: value for name, value in vars(args).items() if name in Config.model_fields}
        try:
            return args, Config(**given)
        except ConfigError as error:
            self.error(str(error))

    def print_help(self, file: Any = None) -> None:
        if file is not None:
            return super().print_help(file)
        if sys.stdout is None:
            self.exit(1, f"{self.prog}: error: stdout is closed\n")
        try:
            print(self.format_help(), end="", flush=True)  # argparse would ignore an error
        except BrokenPipeError:
            raise
        except OSError as error:
            discard_stdout()
            self.exit(1, f"{self.prog}: error: cannot write stdout: {error.strerror}\n")

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
    """The message as one short line of characters that a terminal shows and does not obey.

    Others, such as ESC, bidirectional overrides and lone surrogates, become escapes (`\\x1b`).
    """
    text = textwrap.shorten(
        str(message)[:_MAX_SCANNED_CHARS], MAX_MESSAGE_CHARS, placeholder=" ..."
    )
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def run_command(prog: str, command: Callable[[], int]) -> int:
    """Run `command` and return its exit code; an error prints one line and gives 1 instead.

    A wrong setting gives 2, an interrupt 130 and no line. A stdout that nobody reads any more is
    left to `standard_streams`. With `VOX_SERVE_TRACEBACK=1` errors are
    raised again: the traceback replaces the line.
    """
    # Otherwise torch's OpenMP threads spin after each of the codec's ops, on cores that the kernels
    # need. Set here because OpenMP reads the variable when the command loads torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return command()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        is_quiet = isinstance(error, BrokenPipeError) and stdout_is_broken()
        if is_quiet or os.environ.get("VOX_SERVE_TRACEBACK"):
            raise
        known = isinstance(error, CommandError | OSError | ValueError) and str(error)
        message = error if known else f"{type(error).__name__}: {error}"
        print(f"{prog}: error: {one_line(message)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
