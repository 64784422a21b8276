"""Connections that hurt no other: timeouts, a limit, half-closed clients and early answers.

uvicorn closes idle keep-alive connections and leaves all else to a proxy. `ConnectionGuard` adds to
each connection of a server what it misses:

- A head or body that does not arrive in time, and an answer that is not read, end the connection.
- The number of connections stays below the limit on open files: a new one takes the place of the
  one that has been silent for longest.
- An answer that precedes the end of the request's body closes the connection, but slowly: a close
  with unread input resets it, and the client might lose the answer.
- A client that has sent its request and closed its side of the connection gets its answer. One that
  is gone looks the same until something is sent to it, so it is probed.
"""

import asyncio
import logging
import os
import resource
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vox_serve import error_pace
from vox_serve.client_pace import ClientPace
from vox_serve.config import ServerSettings
from vox_serve.guarded_protocol import GuardedProtocol, GuardedTransport
from vox_serve.http_io import AsciiJSONResponse
from vox_serve.request_id import STATE_KEY

logger = logging.getLogger("vox_serve")

ACCEPT_BATCH = 16
"""Connections that asyncio accepts at once. It does so before the limit can act on any of them."""

BACKLOG = 2048
"""Connections that the kernel holds until they are accepted."""

DEFAULT_MAX_CONNECTIONS = 4096

SPARE_FILES = 64 + 6 * ACCEPT_BATCH
"""Descriptors kept free: for files and lookups, and for batches accepted but not yet limited."""


class ConnectionGuard:
    """Timeouts and limits for the connections of one server.

    Args:
        config: the settings.
        statuses: counts the answers that it gives instead of the application, by status.

    Attributes:
        max_connections: the setting, or as many as the limit on open files permits.
        counts: connections ended, by reason.
        pace: when errors are answered.
    """

    def __init__(
        self, config: ServerSettings, statuses: MutableMapping[int, int] | None = None
    ) -> None:
        self.config = config
        self._statuses = {} if statuses is None else statuses
        self.max_connections = connection_limit(config.max_connections)
        self.counts: Counter[str] = Counter()
        self.pace = ClientPace(config.max_errors_per_s, error_pace.BURST)
        shortest_s = min(
            config.header_timeout_s,
            config.body_timeout_s,
            config.keep_alive_s,
            config.stall_timeout_s,
        )
        self._interval_s = min(1.0, shortest_s / 4)
        # HTTP connections, the one that has been silent for longest first.
        self._silent: dict[GuardedProtocol, None] = {}
        # uvicorn's set of all connections, those of WebSockets too.
        self._all: set[Any] = set()
        self._is_sweeping = False

    def protocol_class(self) -> type[asyncio.Protocol]:
        """uvicorn's HTTP protocol, guarded."""
        return type("GuardedProtocol", (GuardedProtocol,), {"guard": self})

    def admit(self, new: "GuardedProtocol") -> None:
        """Register a new connection, and make room for it if there are too many."""
        self._all = new.connections
        self._silent[new] = None
        if not self._is_sweeping:
            self._is_sweeping = True
            new.loop.call_later(self._interval_s, self._sweep, new.loop)
        if len(self._all) <= self.max_connections:
            return
        others = [connection for connection in self._silent if connection is not new]
        for connection in others:
            if connection.is_waiting_for_client:
                self.drop(connection, "was silent while others wanted to connect")
                return
        for connection in others:
            if connection.is_waiting_for_reader:
                self.drop(connection, "read slowly while others wanted to connect")
                return
        self.counts["refused"] += 1
        logger.warning("refused a client: %d connections are open", len(self._all) - 1)
        new.answer_and_close(429, "too many connections: try later", "Retry-After: 1")

    def heard(self, connection: "GuardedProtocol") -> None:
        """Note that the client has sent something."""
        if connection in self._silent:
            del self._silent[connection]
            self._silent[connection] = None

    def stop_pacing(self) -> None:
        """Send all answers that wait for their turn, and let no further one wait."""
        self.pace = ClientPace(0, error_pace.BURST)
        for connection in list(self._silent):
            connection.end_wait()

    def count(self, status: int) -> None:
        """Count an answer that the application knows nothing of."""
        self._statuses[status] = self._statuses.get(status, 0) + 1

    def forget(self, connection: "GuardedProtocol") -> None:
        self._silent.pop(connection, None)

    def drop(self, connection: Any, reason: str) -> None:
        """End a connection at once. Its request ends as soon as the event loop runs."""
        self.counts[reason] += 1
        logger.warning("dropped a client that " + reason)
        if isinstance(connection, GuardedProtocol):
            # Its place is free from now on. A WebSocket's protocol insists on leaving by itself.
            self.forget(connection)
            self._all.discard(connection)
        connection.transport.abort()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        config = self.config
        unread = {}
        for connection in list(self._all):
            transport = connection.transport
            if not isinstance(transport, GuardedTransport):
                continue
            if transport.stalled_s(now) > config.stall_timeout_s:
                self.drop(connection, "stopped reading its answer")
            elif num_bytes := transport.get_write_buffer_size():
                unread[connection] = num_bytes
        for connection in list(self._silent):
            connection.check(now)
        excess = sum(unread.values()) - config.max_unread_bytes
        for connection in sorted(unread, key=lambda one: -one.transport.stalled_s(now)):
            if excess <= 0:
                break
            excess -= unread[connection]
            self.drop(connection, "held too much unread audio")
        self._is_sweeping = bool(self._all)
        if self._is_sweeping:
            loop.call_later(self._interval_s, self._sweep, loop)


def connection_limit(wanted: int | None) -> int:
    """`wanted`, or a default, but no more than the limit on open files permits now."""
    most = wanted or DEFAULT_MAX_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return most
    room = files - _count_open_files() - min(SPARE_FILES, files // 4)
    return max(1, min(most, room))


def _count_open_files() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder))
        except OSError:
            continue
    return 64  # more than the server has open at its start


class CloseUnread:
    """ASGI middleware for responses that do not depend on the request's body.

    One that starts before the body has arrived tells the client that the connection closes. A
    request whose length is given in two ways is refused, since a proxy may have read it otherwise.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope.get("state", {}).get(STATE_KEY)
        if scope["type"] != "http" or connection is None:
            return await self.app(scope, receive, send)

        async def send_or_close(message: Message) -> None:
            if message["type"] == "http.response.start" and connection.is_receiving:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        headers = Headers(scope=scope)
        if "transfer-encoding" in headers and "content-length" in headers:
            refused = AsciiJSONResponse(
                {"detail": "the request has both Content-Length and Transfer-Encoding"},
                400,
                headers={"Connection": "close"},
            )
            return await refused(scope, receive, send)
        await self.app(scope, receive, send_or_close)
