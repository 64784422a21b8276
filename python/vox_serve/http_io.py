"""HTTP below the routes: bodies to fields with a limit on their size, jobs to WAV answers."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from vox_serve.audio import wav_file, wav_header
from vox_serve.runner import EngineFailure, Job

logger = logging.getLogger("vox_serve")

T = TypeVar("T")
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

MAX_FORM_FIELDS = 64


class AsciiJSONResponse(JSONResponse):
    """JSON that holds any text, lone surrogates too, as `\\u` escapes."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


async def read_fields(request: Request, max_bytes: int) -> tuple[dict[str, Any], bool]:
    """A request's fields, and whether they came as a form (all values are then text).

    JSON is what says so, what has no content type, and what starts with `{`: `curl -d` labels any
    body a form. A form field that is empty was not filled in, and is left out. So is JSON null.

    Raises:
        HTTPException: 413, 415, or 400 for a body that is not what its type says.
    """
    body = await _read_body(request, max_bytes)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return _form_fields(await _multipart_items(request, body)), True
    if kind in ("", "application/json") or kind.endswith("+json") or body.lstrip()[:1] == b"{":
        return _json_fields(body), False
    if kind == "application/x-www-form-urlencoded":
        try:
            items = parse_qsl(
                body.decode(),
                keep_blank_values=True,
                errors="strict",
                max_num_fields=MAX_FORM_FIELDS,
            )
        except ValueError as error:
            raise HTTPException(400, f"the form cannot be read: {error}") from None
        return _form_fields(items), True
    raise HTTPException(415, "send application/json or a form")


async def _read_body(request: Request, max_bytes: int) -> bytes:
    refused = HTTPException(413, f"the body is longer than {max_bytes} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise refused
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_bytes:
                raise refused
    except ClientDisconnect:  # nobody will read this answer
        raise HTTPException(400, "the body is cut short") from None
    return bytes(body)


async def _multipart_items(request: Request, body: bytes) -> list[tuple[str, Any]]:
    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    copy = Request(request.scope, replay)
    try:
        async with copy.form(
            max_files=0, max_fields=MAX_FORM_FIELDS, max_part_size=len(body) + 1
        ) as form:
            return form.multi_items()
    except UnicodeError as error:  # the charset is one of Python's odd codecs
        raise HTTPException(400, f"the form cannot be read: {error}") from None


def _form_fields(items: list[tuple[str, Any]]) -> dict[str, Any]:
    filled = [(name, value) for name, value in items if value != ""]
    fields = dict(filled)
    if len(fields) < len(filled):
        raise HTTPException(422, "the form gives a field more than once")
    return fields


def _json_fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except RecursionError:
        raise HTTPException(400, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise HTTPException(422, "the body must be a JSON object")
    return {name: value for name, value in fields.items() if value is not None}


class SpeechResponse(Response):
    """A job's audio as a WAV: whole, or in chunks as it is made.

    Nothing is sent before the first frame, so that an error until then still gets its own status
    code. A client that goes away ends the job.

    Args:
        job: closed with the response.
        streaming: send the header with the first frame, then each frame.
    """

    media_type = "audio/wav"

    def __init__(self, job: Job, streaming: bool):
        super().__init__()
        self.job = job
        self.streaming = streaming

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        async def answer() -> None:
            first = await anext(self.job, b"")
            if self.streaming and first:
                await self._stream(first, send)
            else:
                pcm = b"".join([first, *[chunk async for chunk in self.job]])
                whole = Response(wav_file(pcm), media_type=self.media_type)
                await whole(scope, receive, send)

        with self.job:
            await _unless_gone(receive, answer())

    async def _stream(self, first: bytes, send: Send) -> None:
        async def send_chunk(body: bytes, more: bool) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        headers = [(b"content-type", self.media_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send_chunk(wav_header(None) + first, True)
        try:
            async for chunk in self.job:
                await send_chunk(chunk, True)
        except EngineFailure as error:
            # The status is sent: a response without its last chunk tells the client.
            logger.error("request %s was cut: %s", self.job.request.id, error)
            return
        await send_chunk(b"", False)


async def _unless_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work; cancel it when the client disconnects."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
