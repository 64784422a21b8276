"""Jobs to WAV responses: whole, or in chunks as they are made."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack
from typing import Any, TypeVar

from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Send

from vox_serve.audio import pcm16, wav_header
from vox_serve.ending import fade_tail
from vox_serve.job import Job, ReaderStalled, RequestFailed, Unavailable

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left. Nobody reads it."""

logger = logging.getLogger("vox_serve")

SLICE_BYTES = 65_536
"""Bytes of a whole answer that are sent at a time. What the client has not taken stays in its job,
where it counts as unread."""


class ClientGone(Exception):  # noqa: N818
    """The client has disconnected."""


async def speech_response(job: Job, streaming: bool, receive: Receive) -> Response:
    """A job's audio as a WAV: whole, or in chunks as it is made.

    No response exists before the first frame, so that an error until then still gets its own
    status code; a whole answer has no response before its last. A client that disconnects ends the
    job.

    Args:
        job: closed here, or by the response that sends it.
        streaming: send the header with the first frame, then each frame.
        receive: of the request, whose body has been read.
    """
    with ExitStack() as stack:
        stack.enter_context(job)
        try:
            if streaming and (first := await unless_gone(receive, anext(job, b""))):
                stack.pop_all()
                return _SpeechResponse(job, _stream(job, first))
            num_bytes = await unless_gone(receive, job.finished())
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        header = wav_header(num_bytes)
        headers = {"Content-Length": str(len(header) + num_bytes)}
        if job.finish_reason is not None:
            headers["X-Finish-Reason"] = job.finish_reason
        stack.pop_all()
        return _SpeechResponse(job, _whole(job, header), headers)


class _SpeechResponse(StreamingResponse):
    """A WAV from a job, which it closes."""

    def __init__(
        self, job: Job, content: AsyncIterator[bytes], headers: dict[str, str] | None = None
    ):
        super().__init__(content, media_type="audio/wav", headers=headers)
        self.job = job

    async def stream_response(self, send: Send) -> None:
        with self.job as job:
            try:
                await super().stream_response(send)
            except (Unavailable, RequestFailed) as error:
                # The status is sent: the missing last chunk tells the client.
                level = logging.WARNING if isinstance(error, ReaderStalled) else logging.ERROR
                logger.log(level, "request %s was cut: %s", job.request.id, error)
            else:
                ending = job.request.id, job.finish_reason, job.num_frames
                logger.info("request %s ended: %s, %d frames", *ending)


async def _stream(job: Job, first: bytes) -> AsyncIterator[bytes]:
    yield wav_header(None) + first
    last = first
    try:
        async for chunk in job:
            last = chunk
            yield chunk
        if job.interrupted:
            yield _fade_after(last)
    except (Unavailable, RequestFailed) as error:
        if not isinstance(error, ReaderStalled):
            yield _fade_after(last)
        raise


def _fade_after(chunk: bytes) -> bytes:
    """PCM that leads from a chunk's last sample to zero."""
    sample = int.from_bytes(chunk[-2:], "little", signed=True) / 32768
    return pcm16(fade_tail(sample)).tobytes()


async def _whole(job: Job, header: bytes) -> AsyncIterator[bytes]:
    piece = bytearray(header)
    async for chunk in job:
        piece += chunk
        if len(piece) >= SLICE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`.

    Raises:
        ClientGone: the client disconnected; `work` is cancelled.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
