"""Print completions of `vox-serve` for a shell, made from the commands' own parsers.

vox-serve completion bash > ~/.local/share/bash-completion/completions/vox-serve
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vox_serve import detect, launch, models, say, voices
from vox_serve.cli import CommandError, CommandParser, run_command
from vox_serve.cluster import __main__ as cluster
from vox_serve.config import Config
from vox_serve.console import standard_streams
from vox_serve.setting import choices

PROG = "completion"
SHELLS = ("bash", "zsh")
FILE_KINDS = ("WAV", "NPY", "FILE", "JSON")
"""Metavars of flags that take a file."""

FOLDERS = ("voices", "weight_cache")
"""Settings that are a folder; a model or a codec may be one too."""


@standard_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = CommandParser(
        PROG,
        description="Print completions of vox-serve for a shell. For bash: vox-serve completion "
        "bash > ~/.local/share/bash-completion/completions/vox-serve",
        usage="vox-serve completion bash|zsh",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    shell = parser.parse_args(argv).shell

    def show() -> int:
        print(completion(shell))
        return 0

    return run_command(PROG, show)


def completion(shell: str) -> str:
    """A script for a shell.

    Raises:
        CommandError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise CommandError("this needs the package shtab: pip install shtab") from None
    top = argparse.ArgumentParser(prog="vox-serve")
    commands = top.add_subparsers()
    for name, module in (
        ("launch", launch),
        ("cluster", cluster),
        ("say", say),
        ("voices", voices),
        ("models", models),
        ("detect", detect),
    ):
        parser = module.make_parser()
        for action in parser._actions:
            _complete(action, shtab)
        commands.add_parser(name, parents=[parser], add_help=False, help=parser.description)
    add = commands.add_parser("completion", help="print completions for a shell")
    add.add_argument("shell", choices=SHELLS)
    script: str = shtab.complete(top, shell)
    return script


def _complete(action: argparse.Action, shtab: Any) -> None:
    """Tell shtab what a flag takes."""
    field = Config.model_fields.get(action.dest)
    if field is not None and (values := choices(field)):
        action.choices = values
    if action.metavar in FILE_KINDS or action.dest in ("context", "codec", "adapter", "tokenizer"):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.dest in (*FOLDERS, "model"):
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
