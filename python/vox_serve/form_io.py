"""Forms to fields: multipart, with files, and url-encoded."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from typing import Any
from urllib.parse import parse_qsl

from fastapi import HTTPException
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from vox_serve.json_file import MAX_UPLOAD_ITEMS, JsonError, check_items

MAX_FORM_FIELDS = 64

MAX_FIELD_BYTES = 2**23
"""Longest text in a form with files. Decoding it holds Python's lock for some milliseconds."""

PIECE_BYTES = 2**16
"""Bytes of a form that are parsed at a time, between which the event loop does other work. The
slowest contents, those without a delimiter, take 0.3 ms."""

Parts = list[tuple[str, str | bytes]]
"""Each part's name, and its text or, of a file, its bytes."""


async def read_multipart(
    headers: Headers, stream: AsyncIterable[bytes], max_bytes: int, max_files: int = 0
) -> Parts:
    """Parse a multipart form, all in memory.

    Args:
        headers: the request's.
        stream: the body, of at most `max_bytes`.
        max_bytes: longest body.
        max_files: most files.

    Raises:
        HTTPException: 400 for a body that is no such form, 413 for a text that is too long.
    """
    parser = MultiPartParser(
        headers,
        _pieces(headers, stream, MAX_FORM_FIELDS + max_files),
        max_files=max_files,
        max_fields=MAX_FORM_FIELDS,
        max_part_size=min(max_bytes, MAX_FIELD_BYTES),
    )
    parser.spool_max_size = max_bytes + 1  # no file on disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        is_long = error.message.startswith("Part exceeded")
        reason = f"the form cannot be read: {error.message}"
        raise HTTPException(413 if is_long else 400, reason) from None
    except ValueError as error:  # the charset is one of Python's odd codecs
        raise HTTPException(400, f"the form cannot be read: {error}") from None
    try:
        return [
            (name, value if isinstance(value, str) else await value.read())
            for name, value in form.multi_items()
        ]
    finally:
        await form.close()


async def _pieces(
    headers: Headers, stream: AsyncIterable[bytes], max_parts: int
) -> AsyncGenerator[bytes, None]:
    """A form's body in pieces, each parsed in a turn of its own of the event loop.

    Raises:
        MultiPartException: it has too many delimiters. The parser takes as long for one that is
            incomplete as for a kilobyte.
    """
    delimiter = b"\r\n--" + parse_options_header(headers["content-type"])[1].get(b"boundary", b"")
    num_delimiters = 0
    async for chunk in stream:
        for start in range(0, len(chunk), PIECE_BYTES):
            piece = chunk[start : start + PIECE_BYTES]
            num_delimiters += piece.count(delimiter)
            if num_delimiters > max_parts + 1:
                raise MultiPartException(f"it has more than {max_parts} parts")
            yield piece
            await asyncio.sleep(0)


def urlencoded_items(body: bytes) -> list[tuple[str, str]]:
    """The fields of a url-encoded form.

    Raises:
        ValueError: it is no such form.
    """
    # Starlette's parser takes raw UTF-8 for Latin-1 and replaces invalid bytes silently.
    return parse_qsl(body.decode(), True, errors="strict", max_num_fields=MAX_FORM_FIELDS)


def long_urlencoded_items(body: bytes) -> list[tuple[str, str]]:
    """As `urlencoded_items`; refuse what takes long before it is parsed.

    Raises:
        HTTPException: 413, if it has more than `MAX_UPLOAD_ITEMS` escapes.
    """
    try:
        check_items(body, [b"%"])
    except JsonError:
        reason = f"the form has more than {MAX_UPLOAD_ITEMS} escapes: send multipart/form-data"
        raise HTTPException(413, reason) from None
    return urlencoded_items(body)


def form_fields(items: Sequence[tuple[str, Any]], repeated: str | None = None) -> dict[str, Any]:
    """The fields of a form that were filled in.

    Args:
        items: names and values.
        repeated: the name of files, of which there may be several: their bytes become a list.

    Raises:
        HTTPException: 422, if it gives another field more than once; 400, if that is a file.
    """
    files = [value for name, value in items if name == repeated and isinstance(value, bytes)]
    filled = []
    for name, value in items:
        if isinstance(value, bytes):
            if name != repeated:
                raise HTTPException(400, f"the field {name[:100]!r} cannot be a file")
        elif value != "":
            filled.append((name, value))
    fields: dict[str, Any] = dict(filled)
    if len(fields) < len(filled) or (files and repeated in fields):
        raise HTTPException(422, "the form gives a field more than once")
    return fields | ({repeated: files} if repeated and files else {})
