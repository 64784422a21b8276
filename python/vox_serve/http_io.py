"""HTTP below the routes: size-limited bodies to fields, jobs to WAV responses."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("vox_serve")

T = TypeVar("T")

MAX_FORM_FIELDS = 64


class AsciiJSONResponse(JSONResponse):
    """JSON with all non-ASCII text as `\\u` escapes, so that lone surrogates pass too."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


class HeadAsGet:
    """ASGI middleware that answers HEAD wherever GET is answered, without the body."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"}, receive, send_head)


async def read_fields(request: Request, max_bytes: int) -> tuple[dict[str, Any], bool]:
    """Read a request's fields; also return True if they came as a form (all values are then text).

    A body is JSON if its content type says so or is missing, or if it starts with `{`: `curl -d`
    labels any body a form. An empty form field was not filled in and is left out, and so is a JSON
    null.

    Raises:
        HTTPException: 413, 415, or 400 for a body that contradicts its type.
    """
    request = _limited(request, max_bytes)
    try:
        body = await request.body()
    except ClientDisconnect:  # nobody will read this response
        raise HTTPException(400, "the body is cut short") from None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = (
        kind in ("", "application/json") or kind.endswith("+json") or body.lstrip()[:1] == b"{"
    )
    try:
        if kind == "multipart/form-data":
            limits = {"max_files": 0, "max_fields": MAX_FORM_FIELDS, "max_part_size": max_bytes + 1}
            async with request.form(**limits) as form:
                return _form_fields(form.multi_items()), True
        if is_json:
            return _json_fields(body), False
        if kind == "application/x-www-form-urlencoded":
            # Starlette's parser takes raw UTF-8 for Latin-1 and replaces invalid bytes silently.
            items = parse_qsl(body.decode(), True, errors="strict", max_num_fields=MAX_FORM_FIELDS)
            return _form_fields(items), True
    except ValueError as error:  # for multipart: the charset is one of Python's odd codecs
        raise HTTPException(400, f"the form cannot be read: {error}") from None
    raise HTTPException(415, "send application/json or a form")


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """Read the fields of a large JSON body, without holding up the event loop.

    Raises:
        HTTPException: 413, 415, 400 or 422 (see `read_fields`).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("", "application/json") and not kind.endswith("+json"):
        raise HTTPException(415, "send application/json or multipart/form-data")
    try:
        body = await _limited(request, max_bytes).body()
    except ClientDisconnect:  # nobody will read this response
        raise HTTPException(400, "the body is cut short") from None
    return await asyncio.to_thread(_json_fields, body)


async def read_parts(
    request: Request, max_bytes: int, max_files: int
) -> list[tuple[str, str | bytes]]:
    """Read a multipart form with files, all in memory.

    Args:
        request: its content type is multipart/form-data.
        max_bytes: longest body.
        max_files: most files.

    Returns:
        Each part's name, and its text or, of a file, its bytes.

    Raises:
        HTTPException: 413, or 400 for a body that is no such form.
    """
    request = _limited(request, max_bytes)
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=max_files,
        max_fields=MAX_FORM_FIELDS,
        max_part_size=max_bytes,
    )
    parser.spool_max_size = max_bytes + 1  # no file on disk
    try:
        form = await parser.parse()
    except ClientDisconnect:  # nobody will read this response
        raise HTTPException(400, "the body is cut short") from None
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from None
    except ValueError as error:  # the charset is one of Python's odd codecs
        raise HTTPException(400, f"the form cannot be read: {error}") from None
    try:
        return [
            (name, value if isinstance(value, str) else await value.read())
            for name, value in form.multi_items()
        ]
    finally:
        await form.close()


def _limited(request: Request, max_bytes: int) -> Request:
    """The request, whose body raises 413 as soon as it is longer than `max_bytes`."""
    refused = HTTPException(413, f"the body is longer than {max_bytes} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise refused
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise refused
        return message

    return Request(request.scope, receive)


def _form_fields(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    filled = [(name, value) for name, value in items if value != ""]
    fields = dict(filled)
    if len(fields) < len(filled):
        raise HTTPException(422, "the form gives a field more than once")
    return fields


def _json_fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body, object_pairs_hook=_unique_fields)
    except RecursionError:
        raise HTTPException(400, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise HTTPException(422, "the body must be a JSON object")
    return {name: value for name, value in fields.items() if value is not None}


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise HTTPException(422, f"the JSON gives {names.most_common(1)[0][0][:100]!r} twice")
    return fields
