"""Reads JSON files of unknown origin within bounds on size, nesting and numbers."""

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 4 << 20
"""Longest JSON file that is read; the index of a checkpoint with 10,000 tensors has 1 MB."""
MAX_TOKENIZER_BYTES = 64 << 20
"""Longest tokenizer.json that is read; Llama 3.2's has 17 MB."""
MAX_DEPTH = 64
MAX_UPLOAD_ITEMS = 2**18
"""Most values of a long JSON text from the network. Parsing it holds Python's lock throughout: for
20 ms with so many, but for a second with 8 MiB of `[],[],`, which become 300 MB. Codes that fill a
context of 4,096 positions have half of it."""
MAX_DIGITS = 100
_COUNTED_BYTES = 1 << 20  # by one call, which holds Python's lock
_MAX_NAME_CHARS = 200
"""Longest name of a value in a message. A file may give a long key many values."""


class JsonError(ValueError):
    """A file holds no acceptable JSON; the message gives the reason, not the file."""


def read_json_file(path: Path, any_kind: bool = False) -> Any:
    """Parse a file.

    Args:
        path: the file.
        any_kind: accept pipes and devices too, as for a path that the user typed.

    Raises:
        OSError: it cannot be opened.
        JsonError: it is not a regular file or too long, or see `parse_json`.
    """
    return parse_json(read_bounded(path, MAX_JSON_BYTES, any_kind))


def read_bounded(path: Path, max_bytes: int, any_kind: bool = False) -> bytes:
    """A file's content, of which no more than `max_bytes` are accepted (see `read_json_file`)."""
    if not any_kind:
        refuse_special(path)
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise JsonError(f"it is longer than {max_bytes} bytes")
    return data


def refuse_special(path: Path) -> None:
    """Raise a JsonError for what is no regular file: a pipe would block, a device may be endless.

    Folders are left to `open`, whose error says so.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise JsonError("it is not a regular file")


def bounded_int(text: str) -> int:
    """The `parse_int` of a JSON parser. Without it, 8 MiB of long numbers take 0.25 s, all of it
    with Python's lock.

    Raises:
        JsonError: the number has more than `MAX_DIGITS` digits.
    """
    if len(text) > MAX_DIGITS:
        raise JsonError(f"a number has more than {MAX_DIGITS} digits")
    return int(text)


def check_items(data: bytes, marks: Sequence[bytes] = (b",", b"[", b"{")) -> None:
    """Raise a JsonError if a text has more than `MAX_UPLOAD_ITEMS` marks, before it is parsed."""
    num_items = 0
    for start in range(0, len(data), _COUNTED_BYTES):
        num_items += sum(data.count(mark, start, start + _COUNTED_BYTES) for mark in marks)
        if num_items > MAX_UPLOAD_ITEMS:
            raise JsonError(f"it has more than {MAX_UPLOAD_ITEMS} values")


def parse_json(data: bytes, parse_int: Callable[[str], int] | None = None) -> Any:
    """Parse UTF-8 JSON.

    Args:
        data: the text.
        parse_int: reads whole numbers; `bounded_int` for long texts from the network.

    Raises:
        JsonError: it is not JSON, nests deeper than `MAX_DEPTH`, gives a key of an object twice, or
            has a number that is not finite; the message names the key.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_int=parse_int)
    except RecursionError:
        raise JsonError("it nests too deeply") from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(str(error)) from None
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = names.most_common(1)[0][0]
        raise JsonError(f"key {twice[:100]!r} is given twice")
    return found


def _check(value: Any) -> None:
    """Check nesting and numbers, without recursion."""
    level: list[tuple[str, Any]] = [("", value)]
    for _ in range(MAX_DEPTH + 1):
        for name, item in level:
            if isinstance(item, float) and not math.isfinite(item):
                where = f"{name.removeprefix('.')}: " if name else ""
                raise JsonError(f"{where}the number is not finite")
        level = [child for name, item in level for child in _children(name, item)]
        if not level:
            return
    raise JsonError(f"it nests too deeply: more than {MAX_DEPTH} levels")


def _children(name: str, item: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(item, dict):
        return [
            (f"{name}.{key[:_MAX_NAME_CHARS]}"[:_MAX_NAME_CHARS], child)
            for key, child in item.items()
            if _matters(child)
        ]
    if isinstance(item, list):
        return [(name, child) for child in item if _matters(child)]
    return ()


def _matters(item: Any) -> bool:
    return isinstance(item, dict | list | float)


def shown(value: object) -> str:
    """A value of a file as a message shows it: only the start, if it is long."""
    try:
        text = repr(value)
    except RecursionError:
        text = "a value that nests too deeply"
    return text if len(text) <= 100 else f"{text[:100]}..."
