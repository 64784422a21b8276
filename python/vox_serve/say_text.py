"""The text that `say` says: an argument, a file, or stdin."""

import sys
from pathlib import Path
from typing import IO

from vox_serve.cli import CommandError
from vox_serve.text_bound import check_length


def read_text(text: str | None, path: str | None, max_chars: int) -> str:
    """The text; one that is too long is cut somewhere above `max_chars`.

    Args:
        text: the argument; None if there is none.
        path: of a UTF-8 file; None, or `-` for stdin.
        max_chars: longest text.

    Raises:
        CommandError: it cannot be read.
    """
    if text is not None:
        return text
    if path is None or path == "-":
        return _read_stdin(max_chars)
    try:
        with Path(path).open("rb") as file:
            return _decode(file, max_chars).removeprefix("\ufeff")
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None


def text_problem(text: str, max_chars: int) -> str | None:
    """Why a text cannot be said; None if it can."""
    try:
        check_length(text, max_chars)
    except ValueError as error:
        return str(error)
    if not text.strip():
        return "there is no text to say"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text is not UTF-8"
    return None


def _read_stdin(max_chars: int) -> str:
    if sys.stdin is None:
        raise CommandError("stdin is closed: give a text")
    if sys.stdin.isatty():
        print("type what to say, then ctrl-D:", file=sys.stderr)
    return _decode(sys.stdin.buffer, max_chars)


def _decode(file: IO[bytes], max_chars: int) -> str:
    # UTF-8 takes at most four bytes for a character. The end of a line does not count.
    max_bytes = 4 * max_chars + 2
    data = file.read(max_bytes + 1)
    text = data.decode("utf-8", "replace" if len(data) > max_bytes else "surrogateescape")
    return text.removesuffix("\n").removesuffix("\r")
