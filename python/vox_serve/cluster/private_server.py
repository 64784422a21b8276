"""The server of one replica: that of `launch`, behind a door that names the client.

The first line of a connection says which ticket it is for and who the client is; all that follows
is the client's own HTTP. So a replica sees what a single server would see, to the byte.
"""

import asyncio
import hmac
import itertools
import logging
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import unquote

from starlette.types import ASGIApp

from vox_serve.config import Config
from vox_serve.launch import make_server
from vox_serve.runner import Runner

logger = logging.getLogger("vox_serve")

PREFACE = b"VOXKERN/1"
MAX_PREFACE_BYTES = 256
DRAIN = "drain"
"""In place of a ticket: the replica begins no request any more, and cuts what is not done within
`--drain_s`."""

STOP = "stop"
"""In place of a ticket: the replica cuts all requests."""

RELEASE = "release"
"""In place of a ticket: another replica wants a conversation, which it names where the client's
address is otherwise. The answer is `yes` or `no`, a line."""

OWNER = b"x-voxkern-owner"
"""Header of a replica's answer 421: the address of the replica that has the conversation."""

PREFACE_TIMEOUT_S = 10.0
START_TIMEOUT_S = 3600.0
STOP_TIMEOUT_S = 15.0


class Address(NamedTuple):
    """The way to a replica's server.

    Attributes:
        host, port: where it listens.
        secret: what a door must know.
    """

    host: str
    port: int
    secret: str

    def preface(self, ticket: int | str, client: tuple[Any, Any] | None = None) -> bytes:
        """The first line of a connection.

        Args:
            ticket: of `Tickets.issue`; 0 for none; or `DRAIN` or `STOP`.
            client: address and port of the client; of `RELEASE` the client and its conversation.
        """
        host, port = client or ("unknown", 0)
        words = (PREFACE.decode(), self.secret, str(ticket), str(host).replace(" ", ""), str(port))
        return " ".join(words).encode() + b"\r\n"


class Tickets:
    """Requests that were sent to this replica, until their connections end. Any thread may use it.

    Ray Serve counts a request for as long as its ticket is open.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = {}
        self._unused: dict[int, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._open)

    def issue(self) -> "tuple[int, asyncio.Future[None]]":
        """A ticket's number, and what is done when its connection has ended. Call this on an event
        loop. A ticket that nobody uses ends after `PREFACE_TIMEOUT_S`."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        with self._lock:
            number = next(self._numbers)
            self._open[number] = loop, done
            self._unused[number] = loop.call_later(PREFACE_TIMEOUT_S, self.close, number)
        return number, done

    def claim(self, number: int) -> None:
        """Note that a ticket's connection is there."""
        with self._lock:
            timer, entry = self._unused.pop(number, None), self._open.get(number)
        if timer is not None and entry is not None:
            entry[0].call_soon_threadsafe(timer.cancel)

    def close(self, number: int) -> None:
        """Note that a ticket's connection has ended."""
        with self._lock:
            entry = self._open.pop(number, None)
            self._unused.pop(number, None)
        if entry is not None:
            loop, done = entry
            loop.call_soon_threadsafe(_settle, done)


def _settle(done: "asyncio.Future[None]") -> None:
    if not done.done():
        done.set_result(None)


async def _nothing_here(client: str, key: str) -> bool:
    return True


class Preface(asyncio.Protocol):
    """Reads the first line of a connection, and hands the connection to the server's protocol.

    Args:
        server: whose connection it is.
        protocol: class of the server's protocol.
        options: its arguments.
    """

    def __init__(
        self, server: "PrivateServer", protocol: "type[asyncio.Protocol]", **options: Any
    ) -> None:
        self._server = server
        self._make = lambda: protocol(**options)
        self._line = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(PREFACE_TIMEOUT_S, transport.abort)  # type: ignore[attr-defined]

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._line += data
        line, end, rest = self._line.partition(b"\r\n")
        words = line.decode("latin-1").split(" ")
        if not end and len(line) <= MAX_PREFACE_BYTES:
            return
        self._timer.cancel()
        secret = self._server.address.secret
        if len(words) != 5 or not hmac.compare_digest(words[1].encode(), secret.encode()):
            self._transport.abort()
            return
        _, _, ticket, host, port = words
        if ticket in (DRAIN, STOP):
            self._server.drain() if ticket == DRAIN else self._server.runner.request_stop()
            self._transport.close()
            return
        if ticket == RELEASE:
            self._releasing = asyncio.ensure_future(self._release(unquote(host), unquote(port)))
            return
        named = _Named(self._transport, (host, int(port)), self._server.tickets, int(ticket))
        protocol: Any = self._make()
        named.hand_to(protocol)
        if rest:
            protocol.data_received(rest)

    async def _release(self, client: str, key: str) -> None:
        is_free = await self._server.release(client, key)
        self._transport.write(b"yes\n" if is_free else b"no\n")
        self._transport.close()


class _Named:
    """A connection's transport that has the client's address, and ends a ticket.

    Args:
        transport: of the connection.
        client: address and port of the client.
        tickets: of the server.
        ticket: ends with the connection.
    """

    def __init__(
        self, transport: Any, client: tuple[str, int], tickets: Tickets, ticket: int
    ) -> None:
        self._inner, self._client = transport, client
        self._tickets, self._ticket = tickets, ticket
        tickets.claim(ticket)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        found = self._inner.get_extra_info(name, default)
        if name == "socket" and found is not None:
            return _NamedSocket(found, self._client)
        return self._client if name == "peername" else found

    def set_protocol(self, protocol: Any) -> None:
        """The connection's next protocol: a WebSocket's follows that of HTTP."""
        lost = protocol.connection_lost

        def connection_lost(error: Exception | None) -> None:
            self._tickets.close(self._ticket)
            lost(error)

        protocol.connection_lost = connection_lost
        self._inner.set_protocol(protocol)

    def hand_to(self, protocol: Any) -> None:
        self.set_protocol(protocol)
        protocol.connection_made(self)


class _NamedSocket:
    """A connection's socket, for those who ask it for the client's address."""

    def __init__(self, inner: Any, client: tuple[str, int]) -> None:
        self._inner, self._client = inner, client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def getpeername(self) -> tuple[str, int]:
        return self._client


class PrivateServer:
    """Runs an engine and its HTTP server in threads of their own.

    Args:
        config: the settings.
        runner: of the engine, not started yet.
        app: starts and stops the runner.
        host: address to listen on, at a free port.

    Attributes:
        runner: see the arguments.
        address: for doors.
        tickets: the requests that are here.
        loop: the server's event loop, once it has started.
        on_start: called on it before.
        release: gives a client's conversation up for another replica, if it is not in use.

    Raises:
        OSError: the address is none of this machine's.
    """

    def __init__(
        self, config: Config, runner: Runner, app: ASGIApp, host: str = "127.0.0.1"
    ) -> None:
        self.config = config
        self.runner, self.app = runner, app
        self.tickets = Tickets()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.on_start: Callable[[], None] = lambda: None
        self.release: Callable[[str, str], Awaitable[bool]] = _nothing_here
        self._draining: asyncio.Task[None] | None = None
        self._listener = socket.create_server((host, 0))
        self.address = Address(host, self._listener.getsockname()[1], secrets.token_hex(16))
        self._server = make_server(
            self.app,
            self.runner,
            config,
            None,
            wrap=lambda protocol: lambda **options: Preface(self, protocol, **options),
        )
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    def start(self) -> None:
        """Begin to serve; return when the engine is warm.

        Raises:
            RuntimeError: the server cannot start.
        """
        self._thread.start()
        self.runner.is_warm.wait(START_TIMEOUT_S)
        if not self._thread.is_alive():
            raise RuntimeError("the replica's server ended at its start")

    def drain(self) -> None:
        """Begin no request any more. Any thread may call this, also twice."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self._begin_drain)

    def stop(self) -> None:
        """End all requests within `--drain_s`, and the threads."""
        self._server.should_exit = True
        self._thread.join(self.config.drain_s + STOP_TIMEOUT_S)

    def _begin_drain(self) -> None:
        if self._draining is None and not self.runner.draining:
            logger.info("the replica begins no request any more")
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self.runner.drain(self.config.drain_s)
        self.runner.request_stop()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.on_start()
        await self._server.serve(sockets=[self._listener])
