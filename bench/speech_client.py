"""A client of a speech server that notes when each piece of audio arrives.

One asyncio protocol per request, over a socket of its own: a piece costs the client some ten
microseconds, so that hundreds of streams leave the processors to the server.
"""

import asyncio
import hashlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from arrivals import Arrival
from playback import Chunk, Playback, heard_at, play

AUDIBLE = 10 ** (-50 / 20)
"""Least level of audible speech: -50 dBFS over 10 ms, so that a click of one sample is none."""
REFUSED = (429, 503)
MAX_HEADER_BYTES = 65_536


@dataclass
class Target:
    """A server's route for speech.

    Args:
        url: http://host:port, or with a path: /generate (default), or OpenAI's /v1/audio/speech.
        body: further fields of every request.
        sample_rate_hz: of raw PCM; a WAV has its own.
        clients: number of own addresses, 127.0.0.1 and on, that take turns; a server sees as many
            clients. More than one needs a server on this machine.
        timeout_s: longest time of a request.
    """

    url: str
    body: dict[str, Any] = field(default_factory=dict)
    sample_rate_hz: int = 24_000
    clients: int = 1
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{self.url}: expected http://host:port")
        self.host, self.port = parts.hostname, parts.port or 80
        self.path = parts.path if parts.path not in ("", "/") else "/generate"
        self.is_openai = self.path.endswith("/audio/speech")

    def request(self, arrival: Arrival) -> bytes:
        """The bytes of a request, headers included."""
        if self.is_openai:
            fields = {"input": arrival.text, "response_format": "pcm"}
            if arrival.streaming:
                fields["stream"] = True
        else:
            fields = {"text": arrival.text, "seed": arrival.seed, "streaming": arrival.streaming}
        content = json.dumps(fields | self.body).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + content


@dataclass
class Stream:
    """A request and what came of it. Times are in seconds of the event loop's clock.

    Attributes:
        due_s: time at which it had to be sent.
        sent_s: time at which it was sent.
        answer_s: time at which the status came; None if none came.
        chunks: arrivals of audio.
        audible_offset_s: audio before the first audible 10 ms; None if there are none.
        end_s: time of the end, however it ended.
        status: of HTTP; 0 without an answer.
        complete: the answer is audio, all of it.
        problem: reason if the server neither answered in full nor refused.
        digest: SHA-256 of the samples.
        has_begun: set at the first audio, or at the end without any.
    """

    arrival: Arrival
    due_s: float
    sent_s: float = 0.0
    answer_s: float | None = None
    chunks: list[Chunk] = field(default_factory=list)
    audible_offset_s: float | None = None
    end_s: float = 0.0
    status: int = 0
    complete: bool = False
    problem: str | None = None
    digest: str = ""
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def refused(self) -> bool:
        return self.status in REFUSED

    @property
    def first_audio_s(self) -> float | None:
        """Time from when it was due to its first sample."""
        return self.chunks[0][0] - self.due_s if self.chunks else None

    @property
    def audible_s(self) -> float | None:
        """Time from when it was due until its listener hears something."""
        if self.audible_offset_s is None:
            return None
        return heard_at(self.chunks, self.audible_offset_s) - self.due_s

    @property
    def playback(self) -> Playback:
        return play(self.chunks)


class Dechunker:
    """Removes the framing of a chunked HTTP body that arrives in pieces."""

    def __init__(self) -> None:
        self.ended = False
        self._held = b""
        self._left = 0  # bytes of the current chunk, with its closing CRLF

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in the next piece.

        Raises:
            ValueError: the framing is wrong.
        """
        self._held += data
        out = []
        while not self.ended and self._held:
            if self._left:
                part = self._held[: self._left]
                out.append(part[: max(self._left - 2, 0)])
                self._left -= len(part)
                self._held = self._held[len(part) :]
                continue
            line, newline, rest = self._held.partition(b"\r\n")
            if not newline:
                break
            size = int(line.partition(b";")[0], 16)
            self.ended = size == 0
            self._left, self._held = size + 2, rest
        return b"".join(out)


def wav_layout(head: bytes) -> tuple[int, int] | None:
    """Offset of the samples and sample rate of a mono 16-bit WAV; None if the header is incomplete.

    Raises:
        ValueError: another format.
    """
    if not b"RIFF".startswith(head[:4]):
        raise ValueError("no WAV")
    at, rate_hz = 12, 0
    while len(head) >= at + 8:
        name, size = struct.unpack_from("<4sI", head, at)
        if name == b"data":
            return at + 8, rate_hz
        if name == b"fmt ":
            if len(head) < at + 24:
                return None
            kind, channels, rate_hz, _, _, bits = struct.unpack_from("<HHIIHH", head, at + 8)
            if (kind, channels, bits) != (1, 1, 16) or not rate_hz:
                raise ValueError(f"WAV of format {kind}, {channels} channels, {bits} bits")
        at += 8 + size + size % 2
    return None


class _Reading(asyncio.Protocol):
    """Reads an answer into a stream."""

    def __init__(self, stream: Stream, target: Target, clock: asyncio.AbstractEventLoop):
        self.ended: asyncio.Future[None] = clock.create_future()
        self.transport: asyncio.Transport | None = None
        self._stream = stream
        self._target = target
        self._clock = clock
        self._head = b""
        self._wav_head: bytes | None = b""
        self._dechunker: Dechunker | None = None
        self._left: int | None = None  # bytes of the body; None until the connection closes
        self._rate_hz = target.sample_rate_hz
        self._digest = hashlib.sha256()
        self._unheard = b""  # less than a block
        self._silent_blocks = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._stream.sent_s = self._clock.time()
        transport.write(self._target.request(self._stream.arrival))

    def data_received(self, data: bytes) -> None:
        now = self._clock.time()
        try:
            if self._stream.answer_s is None:
                self._head += data
                head, found, data = self._head.partition(b"\r\n\r\n")
                if not found:
                    if len(head) > MAX_HEADER_BYTES:
                        raise ValueError("a head without an end")
                    return
                self._stream.answer_s = now
                self._read_head(head)
            self._read_body(data, now)
        except ValueError as error:
            self._finish(False, f"malformed answer: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        whole = self._left is None and self._dechunker is None and self._stream.status > 0
        self._finish(whole and not error, "cut")

    def _read_head(self, head: bytes) -> None:
        status, *lines = head.decode("latin-1").split("\r\n")
        self._stream.status = int(status.split()[1])
        headers = {k.strip().lower(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._dechunker = Dechunker()
        elif "content-length" in headers:
            self._left = int(headers["content-length"])
        if "wav" not in headers.get("content-type", ""):
            self._wav_head = None

    def _read_body(self, data: bytes, now: float) -> None:
        if self._dechunker:
            data, ended = self._dechunker.feed(data), self._dechunker.ended
        elif self._left is not None:
            self._left -= len(data)
            ended = self._left <= 0
        else:
            ended = False
        if data and self._stream.status == 200:
            self._read_audio(data, now)
        if ended:
            self._finish(True, None)

    def _read_audio(self, data: bytes, now: float) -> None:
        if self._wav_head is not None:
            self._wav_head += data
            layout = wav_layout(self._wav_head)
            if layout is None:
                return
            data, self._rate_hz = self._wav_head[layout[0] :], layout[1]
            self._wav_head = None
        if not data:
            return
        stream = self._stream
        stream.chunks.append((now, len(data) / (2 * self._rate_hz)))
        self._digest.update(data)
        stream.has_begun.set()
        if stream.audible_offset_s is None:
            self._listen(self._unheard + data)

    def _listen(self, pcm: bytes) -> None:
        block = self._rate_hz // 100
        blocks = np.frombuffer(pcm, "<i2", len(pcm) // (2 * block) * block).reshape(-1, block)
        levels = np.sqrt(np.mean(np.square(blocks.astype(np.float32) / 32768), axis=1))
        audible = np.flatnonzero(levels >= AUDIBLE)
        if len(audible):
            self._stream.audible_offset_s = (self._silent_blocks + int(audible[0])) / 100
        self._silent_blocks += len(blocks)
        self._unheard = pcm[2 * blocks.size :]

    def _finish(self, whole: bool, problem: str | None) -> None:
        if self.ended.done() or self._stream.end_s:
            return
        stream = self._stream
        stream.complete = whole and stream.status == 200 and bool(stream.chunks)
        if not stream.complete and not stream.refused:
            odd = whole and (f"status {stream.status}" if stream.status != 200 else "no audio")
            stream.problem = odd or problem
        stream.digest = self._digest.hexdigest()
        stream.end_s = self._clock.time()
        stream.has_begun.set()
        self.ended.set_result(None)
        if self.transport:
            self.transport.abort()


async def speak(target: Target, arrival: Arrival, due_s: float | None = None) -> Stream:
    """Send a request at once and read its answer; see `begin`."""
    stream, reading = begin(target, arrival, due_s)
    await reading
    return stream


def begin(
    target: Target, arrival: Arrival, due_s: float | None = None
) -> tuple[Stream, "asyncio.Task[None]"]:
    """Send a request at once; the stream, and the task that ends with it and raises nothing.

    Args:
        target: receives the request.
        arrival: the request.
        due_s: time from which first audio counts; now by default.
    """
    loop = asyncio.get_running_loop()
    stream = Stream(arrival, loop.time() if due_s is None else due_s)
    return stream, loop.create_task(_converse(stream, target))


async def _converse(stream: Stream, target: Target) -> None:
    loop = asyncio.get_running_loop()
    reading = _Reading(stream, target, loop)
    own = None
    if target.clients > 1:
        own = (f"127.0.0.{1 + stream.arrival.seed % target.clients}", 0)
    try:
        async with asyncio.timeout(target.timeout_s):
            stream.sent_s = loop.time()
            await loop.create_connection(lambda: reading, target.host, target.port, local_addr=own)
            await reading.ended
    except TimeoutError:
        stream.problem = "timeout"
    except OSError as error:
        stream.problem = f"no connection: {error.strerror or error}"
    finally:
        if not stream.end_s:
            stream.end_s = loop.time()
            stream.has_begun.set()
        if reading.transport:
            reading.transport.abort()
