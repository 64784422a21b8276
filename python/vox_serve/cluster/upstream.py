"""One HTTP request to a replica, over a connection of its own."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import h11

from vox_serve.cluster.private_server import Address

CONNECT_TIMEOUT_S = 2.0
"""A replica that is there accepts at once."""

RECEIVE_BYTES = 65_536
"""Bytes of an answer that the kernel keeps for the door: a slow client's stream should wait in the
replica, which knows what to do about it."""

MAX_HEAD_BYTES = 65_536


class ReplicaLostError(ConnectionError):
    """The replica cannot be reached, or its answer ended early."""


async def connect(
    address: Address, ticket: int | str, client: tuple[Any, Any] | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a replica, on which its first line was written.

    Raises:
        ReplicaLostError: it does not accept.
    """
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            raw = await connected_socket(address)
            reader, writer = await asyncio.open_connection(sock=raw, limit=RECEIVE_BYTES)
    except (OSError, TimeoutError) as error:
        raise ReplicaLostError(f"the replica at {address.host} does not accept: {error}") from None
    writer.write(address.preface(ticket, client))
    return reader, writer


async def connected_socket(address: Address) -> socket.socket:
    """A socket that is connected to a replica.

    Raises:
        OSError: it does not accept.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    raw = socket.socket(family, socket.SOCK_STREAM)
    try:
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(raw, (address.host, address.port))
    except BaseException:
        raw.close()
        raise
    return raw


class Upstream:
    """A request that is sent as bytes, and its answer.

    Args:
        reader, writer: of the connection.
        method: of the request, which tells whether the answer has a body.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str
    ) -> None:
        self._reader, self._writer = reader, writer
        # It parses the answer, for which it must know the method. The request is written as it
        # came, which h11 would not do.
        self._answer = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._answer.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        self._answer.send(h11.EndOfMessage())

    def write_head(self, method: str, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        lines = [b"%s %s HTTP/1.1" % (method.encode(), target)]
        lines += [b"%s: %s" % header for header in headers]
        self._writer.write(b"\r\n".join([*lines, b"", b""]))

    async def write(self, data: bytes) -> None:
        """Write a piece of the body. An error shows in the answer."""
        with contextlib.suppress(OSError):
            self._writer.write(data)
            await self._writer.drain()

    async def head(self) -> h11.Response | h11.InformationalResponse:
        """The answer's head; first that of each interim answer.

        Raises:
            ReplicaLostError: the replica is gone.
        """
        event = await self._next()
        if not isinstance(event, h11.Response | h11.InformationalResponse):
            raise ReplicaLostError("the replica closed the connection without an answer")
        return event

    async def body(self) -> AsyncIterator[bytes]:
        """The answer's body, as it comes.

        Raises:
            ReplicaLostError: it ended early.
        """
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise ReplicaLostError("the replica closed the connection within an answer")
            yield bytes(event.data)

    def close(self) -> None:
        """End the connection at once; the replica gives the request up."""
        self._writer.transport.abort()

    async def _next(self) -> h11.Event:
        try:
            while (event := self._answer.next_event()) is h11.NEED_DATA:
                self._answer.receive_data(await self._reader.read(RECEIVE_BYTES))
        except (OSError, h11.RemoteProtocolError) as error:
            raise ReplicaLostError(f"the replica's answer ended early: {error}") from None
        assert not isinstance(event, type)
        return event
