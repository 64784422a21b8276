"""Jobs to responses: whole, or in chunks as they are made, in any format."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Send

from vox_serve import provenance
from vox_serve.audio import pcm16
from vox_serve.encoders import (
    SAMPLE_BYTES,
    UNCHANGED,
    Chain,
    Stage,
    file_bytes,
    open_encoder,
    open_shaper,
)
from vox_serve.encoding_threads import beside, is_copied
from vox_serve.ending import fade_tail
from vox_serve.formats import WAV, Output
from vox_serve.job import Job, ReaderStalled, RequestFailed, Unavailable
from vox_serve.speech_events import EVENTS_TYPE, as_events

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left. Nobody reads it."""

logger = logging.getLogger("vox_serve")

SLICE_BYTES = 65_536
"""Bytes of a whole answer that are sent at a time. What the client has not taken stays in its job,
where it counts as unread."""


class ClientGone(Exception):  # noqa: N818
    """The client has disconnected."""


@dataclass(frozen=True)
class Delivery:
    """The way in which a client gets its audio.

    Attributes:
        streaming: as it is made.
        output: its format.
        note: tells where it comes from, in a header and in the file.
        is_plain: a WAV has no such note.
        events: as server-sent events, of a stream.
    """

    streaming: bool
    output: Output = WAV
    note: str | None = None
    is_plain: bool = False
    events: bool = False

    def open_encoder(self, num_samples: int | None = None) -> Stage:
        """An encoder for the output's sample rate; see `encoders.open_encoder`."""
        is_plain = self.is_plain and self.output.format.name == "wav"
        return open_encoder(self.output, None if is_plain else self.note, num_samples)

    def open_stream(self) -> Stage:
        """A stage from the job's PCM to the client's bytes, of a length that is not known yet."""
        shaper, encoder = open_shaper(self.output), self.open_encoder()
        return encoder if shaper is None else Chain(shaper, encoder)

    def headers(self) -> dict[str, str]:
        """The headers of all answers."""
        headers = {} if self.note is None else {provenance.HEADER: self.note}
        if self.output.format.name in ("pcm", "ulaw"):
            headers["X-Sample-Rate"] = str(self.output.rate_hz)
        if self.streaming:  # no proxy may hold it back, or keep it
            headers |= {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return headers


async def speech_response(job: Job, delivery: Delivery, receive: Receive) -> Response:
    """A job's audio: whole, or in chunks as it is made.

    No response exists before the first frame, so that an error until then still gets its own
    status code; a whole answer has no response before its last. A client that disconnects ends the
    job.

    Args:
        job: closed here, or by the response that sends it.
        delivery: how it is sent.
        receive: of the request, whose body has been read.
    """
    headers = delivery.headers()
    with ExitStack() as stack:
        stack.enter_context(job)
        try:
            first = await unless_gone(receive, anext(job, b"")) if delivery.streaming else b""
            if first or delivery.events:
                stage = await beside(delivery.output, delivery.open_stream)
                content = _stream(job, first, stage, delivery.output)
                stack.pop_all()
                if delivery.events:
                    return _SpeechResponse(job, as_events(job, content), EVENTS_TYPE, headers)
                media_type = delivery.output.format.media_type
                return _SpeechResponse(job, content, media_type, headers)
            num_bytes = await unless_gone(receive, job.finished())
            if not is_copied(delivery.output):
                num_bytes = await unless_gone(receive, _encode_whole(job, delivery))
                stage = UNCHANGED
            else:
                num_samples = num_bytes // SAMPLE_BYTES
                stage = delivery.open_encoder(num_samples)
                num_bytes = file_bytes(delivery.open_encoder(num_samples), num_bytes)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        headers["Content-Length"] = str(num_bytes)
        if job.finish_reason is not None:
            headers["X-Finish-Reason"] = job.finish_reason
        stack.pop_all()
        return _SpeechResponse(job, _whole(job, stage), delivery.output.format.media_type, headers)


class _SpeechResponse(StreamingResponse):
    """Audio from a job, which it closes."""

    def __init__(
        self, job: Job, content: AsyncIterator[bytes], media_type: str, headers: dict[str, str]
    ):
        super().__init__(content, media_type=media_type, headers=headers)
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


async def _stream(job: Job, first: bytes, stage: Stage, output: Output) -> AsyncIterator[bytes]:
    """A job's audio, encoded as it comes."""

    async def encoded(chunk: bytes) -> bytes:
        return await beside(output, partial(stage.feed, chunk))

    async def rest(chunk: bytes = b"") -> bytes:
        end = await encoded(chunk) if chunk else b""
        return end + await beside(output, stage.close)

    last = first
    if piece := await encoded(first):
        yield piece
    try:
        async for chunk in job:
            last = chunk
            if piece := await encoded(chunk):
                yield piece
        if piece := await rest(_fade_after(last) if job.interrupted else b""):
            yield piece
    except (Unavailable, RequestFailed) as error:
        if not isinstance(error, ReaderStalled):
            yield await rest(_fade_after(last))
        raise


async def _encode_whole(job: Job, delivery: Delivery) -> int:
    """Encode a finished job's audio, a frame at a time, and put it back; return its bytes."""
    output = delivery.output
    job.is_encoding = True
    if (shaper := await beside(output, partial(open_shaper, output))) is not None:
        await _convert(job, shaper, output)
    num_samples = job.unread_bytes // SAMPLE_BYTES
    encoder = await beside(output, partial(delivery.open_encoder, num_samples))
    num_bytes = await _convert(job, encoder, output)
    job.is_encoding = False
    return num_bytes


async def _convert(job: Job, stage: Stage, output: Output) -> int:
    pieces = []
    async for chunk in job:
        pieces.append(await beside(output, partial(stage.feed, chunk)))
    pieces.append(await beside(output, stage.close))
    return job.put_back([piece for piece in pieces if piece])


def _fade_after(chunk: bytes) -> bytes:
    """PCM that leads from a chunk's last sample to zero."""
    sample = int.from_bytes(chunk[-2:], "little", signed=True) / 32768
    return pcm16(fade_tail(sample)).tobytes()


async def _whole(job: Job, stage: Stage) -> AsyncIterator[bytes]:
    piece = bytearray()
    async for chunk in job:
        piece += stage.feed(chunk)
        if len(piece) >= SLICE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece) + stage.close()


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
