"""The command `vox-serve`, also `python -m vox_serve`, with subcommands: launch, say, voices, ...

Flags without a subcommand are launch's.
"""

import importlib
import sys
from collections.abc import Callable, Sequence

from vox_serve.console import standard_streams

PROG = "vox-serve"
COMMANDS = ("launch", "cluster", "say", "voices", "models", "detect", "completion")

HELP = """\
usage: vox-serve [COMMAND] [flags]

Text to speech with CSM.

  launch      serve speech over HTTP; the command if none is given
  cluster     the same with several replicas, on Ray Serve
  say         say a text into a file
  voices      add, list, preview or remove voices
  models      tell what a model is, and what this machine can do with it
  detect      tell whether audio files are marked as synthetic speech
  completion  print completions for a shell: bash or zsh

vox-serve COMMAND --help lists a command's flags. Each setting has a variable in
the environment too: --port 9000 is VOX_SERVE_PORT=9000.

examples:
  vox-serve
  vox-serve --model sesame/csm-1b --quantize int4 --port 9000
  vox-serve say "Hello there." -o hello.wav
  vox-serve say -f chapter.txt -o chapter.mp3
  vox-serve voices add anna --audio a.wav --transcript "Hi." --voices ./voices
"""


@standard_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return its exit code."""
    args = sys.argv[1:] if argv is None else list(argv)
    name = args[0] if args else "launch"
    if name in COMMANDS:
        return command(name)(args[1:])
    if name in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if not name.startswith("-"):
        print(f"{PROG}: error: {name!a} is no command (--help lists them)", file=sys.stderr)
        return 2
    return command("launch")(args)


def command(name: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a subcommand's module, which is imported only when it is needed."""
    module = "vox_serve.cluster.__main__" if name == "cluster" else f"vox_serve.{name}"
    main: Callable[[Sequence[str]], int] = importlib.import_module(module).main
    return main


if __name__ == "__main__":
    sys.exit(main())
