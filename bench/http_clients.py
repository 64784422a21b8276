"""Clients of a running server: well-behaved ones that measure, and others that misbehave.

All are coroutines over plain sockets, so that thousands of them fit one process and each can leave
whenever it likes.
"""

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

WAV_HEADER_BYTES = 44


@dataclass(frozen=True)
class Address:
    """A server's address, and the client's own: another one is another client for the server."""

    port: int
    host: str = "127.0.0.1"
    own: str = "127.0.0.1"


@dataclass
class Answer:
    """A response.

    Attributes:
        status: of HTTP.
        body: without the framing of chunks.
        first_audio_s: time from the request to the first sample; None if none came.
        complete: the body ended as its framing says.
    """

    status: int
    body: bytes
    first_audio_s: float | None
    complete: bool


async def connect(
    address: Address, receive_buffer: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection, with a receive buffer of that many bytes if one is given."""
    raw = socket.socket()
    raw.setblocking(False)
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        raw.bind((address.own, 0))
        await asyncio.get_running_loop().sock_connect(raw, (address.host, address.port))
        return await asyncio.open_connection(sock=raw, limit=receive_buffer or 2**20)
    except BaseException:
        raw.close()
        raise


def request_bytes(address: Address, **body: object) -> bytes:
    """A POST /generate with a JSON body."""
    content = json.dumps(body).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {address.host}:{address.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + content


async def generate(address: Address, **body: object) -> Answer:
    """Send a request and read the whole answer.

    Raises:
        OSError: the connection failed before the status came.
    """
    start = time.perf_counter()
    reader, writer = await connect(address)
    try:
        writer.write(request_bytes(address, **body))
        status, headers = await _read_head(reader)
        received, first_audio_s, complete = bytearray(), None, False
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            async for part in _parts(reader, headers):
                received += part
                if first_audio_s is None and len(received) > WAV_HEADER_BYTES:
                    first_audio_s = time.perf_counter() - start
            complete = True
        return Answer(status, bytes(received), first_audio_s, complete)
    finally:
        writer.close()


async def cancel(address: Address, after_bytes: int, **body: object) -> None:
    """Send a request, read so many bytes of the answer, and reset the connection."""
    reader, writer = await connect(address)
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        writer.write(request_bytes(address, **body))
        await reader.readexactly(after_bytes)
    reset(writer)


async def stall(address: Address, seconds: float, **body: object) -> None:
    """Send a request and read nothing for so many seconds, then reset the connection."""
    _, writer = await connect(address, receive_buffer=4096)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(request_bytes(address, **body))
    await asyncio.sleep(seconds)
    reset(writer)


async def send_slowly(address: Address, data: bytes, seconds: float) -> None:
    """Send one byte every half second, until the server hangs up or the time is over."""
    _, writer = await connect(address)
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        for byte in _cycle(data):
            if time.monotonic() > end or writer.transport.is_closing():
                break
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.5)
    reset(writer)


async def stay_silent(address: Address, seconds: float) -> None:
    """Connect and send nothing."""
    try:
        _, writer = await connect(address)
    except OSError:
        return
    await asyncio.sleep(seconds)
    reset(writer)


async def send_raw(address: Address, data: bytes) -> int:
    """Send bytes as they are; the status of the answer, 0 if there was none."""
    reader, writer = await connect(address)
    try:
        writer.write(data)
        status, _ = await _read_head(reader)
        return status
    except (OSError, ValueError):
        return 0
    finally:
        reset(writer)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a reset, as a killed client's system does."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    line = (await reader.readline()).decode("latin-1").split()
    if len(line) < 2 or not line[1].isdecimal():
        raise ConnectionError("the server hung up")
    headers = {}
    while line_bytes := (await reader.readline()).strip():
        name, _, value = line_bytes.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(line[1]), headers


async def _parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\n")).strip(), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        return
    left = int(headers.get("content-length", 0))
    while left:
        part = await reader.read(min(left, 65536))
        if not part:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(part)
        yield part


def _cycle(data: bytes) -> Iterator[int]:
    while True:
        yield from data
