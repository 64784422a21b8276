"""HTTP below the routes: size-limited bodies to fields, jobs to WAV responses."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vox_serve.form_io import (
    Parts,
    form_fields,
    long_urlencoded_items,
    read_multipart,
    urlencoded_items,
)
from vox_serve.json_file import JsonError, bounded_int, check_items

logger = logging.getLogger("vox_serve")

T = TypeVar("T")

MAX_BODY_MEMORY_BYTES = 2**26

FIELD_TIMEOUT_S = 1.0
"""A body that declares more than `--max_body_bytes` must show within this time that it may."""

MAX_JSON_BYTES = 2**23
"""Longest upload as JSON. If it is one long string, parsing it holds Python's lock for 10 ms; see
also `MAX_UPLOAD_ITEMS`."""

MAX_OBJECT_FIELDS = 64
"""Most fields of a JSON object. No valid one has as many, and each unknown one becomes an error."""

MAX_CONTEXT_FILES = 64
"""Most files in a form with a context."""


class AsciiJSONResponse(JSONResponse):
    """JSON with all non-ASCII text as `\\u` escapes, so that lone surrogates pass too."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


def route_path(scope: Scope) -> str:
    """A request's path as the routes have it: without the server's `--root_path`, which a proxy may
    or may not leave out."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    is_below = root and (path == root or path.startswith(root + "/"))
    return path[len(root) :] if is_below else path


def proxy_path(root_path: str | None) -> str:
    """`--root_path` with a slash before it and none at its end; "" for none."""
    root = (root_path or "").strip("/")
    return f"/{root}" if root else ""


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


class BodyMemory:
    """Bounds the bodies that are being read, all together. Only the event loop uses it.

    Beyond the limit, a client that holds more than an equal share of it is refused more. So clients
    that send their bodies slowly over many connections do not keep others out, and n clients
    hold at most 1 + 1/2 + ... + 1/n times the limit.

    Args:
        max_bytes: the limit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._held: Counter[str] = Counter()  # by client

    @contextmanager
    def hold(self, client: str) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes of one body, until the end of the block; below 0,
        bytes that are given up.

        It raises an HTTPException 429 if the client must give up this body.
        """
        own = 0

        def count(num_bytes: int) -> None:
            nonlocal own
            own += num_bytes
            self.num_bytes += num_bytes
            self._held[client] += num_bytes
            is_full = num_bytes > 0 and self.num_bytes > self.max_bytes
            if is_full and self._held[client] > self.max_bytes / len(self._held):
                reason = "too many bodies are being sent: try later"
                raise HTTPException(429, reason, headers={"Retry-After": "1"})

        try:
            yield count
        finally:
            self.num_bytes -= own
            self._held[client] -= own
            if not self._held[client]:
                del self._held[client]


class Upload(NamedTuple):
    """A longer bound for bodies with recordings.

    Attributes:
        names: the fields that may be long. A body without their names in its first `max_bytes` has
            none of them, since the other fields fit into that.
        max_bytes: longest body.
        begin: called before more is read; returns what counts all bytes of the body again (see
            `BodyMemory.hold`).
        file: the field of a multipart form that may be given several times, as files.
    """

    names: tuple[bytes, ...]
    max_bytes: int
    begin: Callable[[], Callable[[int], None]]
    file: str | None = None


def media_type(request: Request) -> str:
    """The body's media type in lower case, without parameters; "" if the request names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_fields(
    request: Request,
    max_bytes: int,
    count: Callable[[int], None] = lambda num_bytes: None,
    upload: Upload | None = None,
) -> tuple[dict[str, Any], bool]:
    """Read a request's fields; also return True if they came as a form (all values are then text).

    A body is JSON if its content type says so or is missing, or if it starts with `{`: `curl -d`
    labels any body a form. An empty form field was not filled in and is left out, and so is a JSON
    null.

    Args:
        request: the request.
        max_bytes: longest body.
        count: see `BodyMemory.hold`.
        upload: the bound for bodies with recordings, if there may be any.

    Raises:
        HTTPException: 413, 415, or 400 for a body that contradicts its type.
    """
    request = _limited(request, max_bytes, count, upload)
    try:
        body = await request.body()
    except ClientDisconnect:  # nobody will read this response
        raise HTTPException(400, "the body is cut short") from None
    kind = media_type(request)
    is_json = (
        kind in ("", "application/json") or kind.endswith("+json") or body.lstrip()[:1] == b"{"
    )
    try:
        if kind == "multipart/form-data":
            file = upload.file if upload else None
            most = MAX_CONTEXT_FILES if file else 0
            parts = await read_multipart(request.headers, _whole(body), len(body) + 1, most)
            fields, is_form = form_fields(parts, file), True
        elif is_json:
            is_form = False
            if len(body) > max_bytes:
                fields = await asyncio.to_thread(_long_json_fields, body)
            else:
                fields = _json_fields(body)
        elif kind == "application/x-www-form-urlencoded":
            if len(body) > max_bytes:
                items = await asyncio.to_thread(long_urlencoded_items, body)
            else:
                items = urlencoded_items(body)
            fields, is_form = form_fields(items), True
        else:
            raise HTTPException(415, "send application/json or a form")
    except ValueError as error:
        raise HTTPException(400, f"the form cannot be read: {error}") from None
    if upload and len(body) > max_bytes and not any(n.decode() in fields for n in upload.names):
        raise _too_long(max_bytes)
    return fields, is_form


async def read_json(
    request: Request, max_bytes: int, count: Callable[[int], None]
) -> dict[str, Any]:
    """Read the fields of a large JSON body in another thread; arguments as in `read_fields`.

    Raises:
        HTTPException: 413, 415, 400 or 422 (see `read_fields`).
    """
    kind = media_type(request)
    if kind not in ("", "application/json") and not kind.endswith("+json"):
        raise HTTPException(415, "send application/json or multipart/form-data")
    try:
        body = await _limited(request, max_bytes, count).body()
    except ClientDisconnect:  # nobody will read this response
        raise HTTPException(400, "the body is cut short") from None
    return await asyncio.to_thread(_long_json_fields, body)


async def read_parts(
    request: Request, max_bytes: int, max_files: int, count: Callable[[int], None]
) -> Parts:
    """Read a multipart form with files, all in memory.

    Args:
        request: its content type is multipart/form-data.
        max_bytes: longest body.
        max_files: most files.
        count: see `BodyMemory.hold`.

    Raises:
        HTTPException: 413, or 400 for a body that is no such form.
    """
    request = _limited(request, max_bytes, count)
    try:
        return await read_multipart(request.headers, request.stream(), max_bytes, max_files)
    except ClientDisconnect:  # nobody will read this response
        raise HTTPException(400, "the body is cut short") from None


async def _whole(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _too_long(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"the body is longer than {max_bytes} bytes")


def _limited(
    request: Request,
    max_bytes: int,
    count: Callable[[int], None] = lambda num_bytes: None,
    upload: Upload | None = None,
) -> Request:
    """The request, whose body raises 413 as soon as it is longer than its bound."""
    limit = max_bytes
    longest = max(max_bytes, upload.max_bytes) if upload else max_bytes
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > longest:
        raise _too_long(longest)
    is_long = declared.isdecimal() and int(declared[:20]) > max_bytes
    num_bytes = 0
    first: list[bytes] | None = [] if upload else None
    deadline_s = asyncio.get_running_loop().time() + FIELD_TIMEOUT_S

    def is_undecided() -> bool:
        """True if the body declares to be long, and nothing so far permits that."""
        if not is_long or first is None or upload is None:
            return False
        head = b"".join(first)
        return not any(name in head for name in upload.names)

    async def receive() -> Message:
        nonlocal num_bytes, limit, count, first
        try:
            async with asyncio.timeout_at(deadline_s if is_undecided() else None):
                message = await request.receive()
        except TimeoutError:
            raise _too_long(max_bytes) from None
        body = message.get("body", b"")
        num_bytes += len(body)
        count(len(body))
        if first is not None and upload:
            first.append(body)
            if num_bytes > limit:
                head = b"".join(first)[:max_bytes]
                if any(name in head for name in upload.names):
                    limit, first = longest, None
                    count = upload.begin()
                    count(num_bytes)
        if num_bytes > limit:
            raise _too_long(limit)
        return message

    return Request(request.scope, receive)


def _long_json_fields(body: bytes) -> dict[str, Any]:
    try:
        check_items(body)
    except JsonError as error:
        raise HTTPException(413, f"the body is refused: {error}") from None
    return _json_fields(body, bounded_int)


def _json_fields(body: bytes, parse_int: Callable[[str], int] | None = None) -> dict[str, Any]:
    try:
        fields = json.loads(body, object_pairs_hook=_unique_fields, parse_int=parse_int)
    except RecursionError:
        raise HTTPException(400, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise HTTPException(422, "the body must be a JSON object")
    return {name: value for name, value in fields.items() if value is not None}


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_OBJECT_FIELDS:
        raise HTTPException(422, f"an object of the JSON has more than {MAX_OBJECT_FIELDS} fields")
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise HTTPException(422, f"the JSON gives {names.most_common(1)[0][0][:100]!r} twice")
    return fields
