"""Events and audio for the client of a WebSocket."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import WebSocket

from vox_serve.audio import pcm16
from vox_serve.conversation_service import Heard
from vox_serve.encoders import open_stream
from vox_serve.encoding_threads import beside
from vox_serve.ending import FRAME_S, fade_tail
from vox_serve.job import Job
from vox_serve.live_messages import MessageError
from vox_serve.live_turn import Turn


class LiveSender:
    """Sends to one client. All methods wait while the client does not read.

    Args:
        socket: accepted already.
        note: goes into the audio's metadata; see provenance.py.

    Raises:
        WebSocketDisconnect: of all methods, when the client is gone.
    """

    def __init__(self, socket: WebSocket, note: str) -> None:
        self._socket = socket
        self._note = note

    async def audio(self, turn: Turn, job: Job) -> None:
        """Send a job's audio, and where its sentences begin and end."""
        encoder = open_stream(turn.output, self._note)
        number = 0
        has_begun = False
        chunk: bytes | None = b""
        while True:
            ends = job.part_ends
            while number < len(ends) and ends[number].num_frames <= turn.num_frames:
                if not has_begun:
                    await self._begin(turn, number)
                reason = ends[number].finish_reason
                await self._sentence("end", turn, number, finish_reason=reason)
                number, has_begun = number + 1, False
            last, chunk = chunk, job.take_nowait()
            if chunk is None:
                if job.ended:
                    break
                await job.changed()
                chunk = last
                continue
            if not has_begun:
                await self._begin(turn, number)
                has_begun = True
            turn.num_frames += 1
            await self._encoded(turn, encoder.feed, chunk)
        if turn.heard is not None:  # nothing is heard any more
            return
        if job.interrupted and last:  # by another connection
            sample = int.from_bytes(last[-2:], "little", signed=True) / 32768
            await self._encoded(turn, encoder.feed, pcm16(fade_tail(sample)).tobytes())
        await self._encoded(turn, encoder.close)

    async def _begin(self, turn: Turn, number: int) -> None:
        part = turn.parts[number]
        span = {"text_start": part.start, "text_end": part.end}
        await self._sentence("begin", turn, number, text=str(part), **span)

    async def _sentence(self, what: str, turn: Turn, number: int, **fields: Any) -> None:
        fields |= {f"sample_{'start' if what == 'begin' else 'end'}": turn.num_samples}
        await self.event(f"sentence.{what}", turn=turn.number, sentence=number, **fields)

    async def _encoded(self, turn: Turn, encode: Callable[..., bytes], *pcm: bytes) -> None:
        """Send what an encoder makes of some samples."""
        if data := await beside(turn.output, partial(encode, *pcm)):
            await self._socket.send({"type": "websocket.send", "bytes": data})

    async def cancelled(self, turn: Turn, heard: Heard) -> None:
        await self.event(
            "cancelled",
            turn=turn.number,
            heard_ms=round(heard.num_frames * FRAME_S * 1000),
            heard_text=heard.text,
            samples=turn.num_samples,
        )

    async def error(self, error: MessageError, turn: Turn | None) -> None:
        retry = {} if error.retry_after_s is None else {"retry_after_s": error.retry_after_s}
        number = turn.number if turn else None
        fields = {"message": str(error), "field": error.field, "turn": number}
        await self.event("error", **fields, **retry)

    async def event(self, kind: str, **fields: Any) -> None:
        await self._socket.send(
            {"type": "websocket.send", "text": json.dumps({"type": kind, **fields})}
        )
