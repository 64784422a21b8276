"""The application that clients reach: it sends each request to one of them.

Ray Serve chooses the replica (see `router.py`) and counts the request until it ends. Its bytes go
over a connection of their own to the replica's server, unchanged, and so does the answer: a client
gets what a single server would have sent. A request of which nothing was answered yet is sent to
another replica when its own is lost or begins nothing any more.
"""

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import h11
from starlette.types import Receive, Scope, Send

from vox_serve.access import PROBE_PATHS
from vox_serve.cluster.private_server import DRAIN, OWNER, STOP, Address
from vox_serve.cluster.request_body import Body, KeptBytes, request_headers
from vox_serve.cluster.summary import live_app, summary
from vox_serve.cluster.upstream import ReplicaLostError, Upstream, connect
from vox_serve.config import Config
from vox_serve.connections import CloseUnread
from vox_serve.http_io import AsciiJSONResponse, proxy_path, route_path
from vox_serve.request_id import RequestIds, current_id
from vox_serve.runner import SHUTTING_DOWN

logger = logging.getLogger("vox_serve")

WAIT_S = 30.0
"""Time that a request waits for a replica, if there is none."""

RETRY_AFTER_S = 2
NO_REPLICA = "no replica can serve: try later"
LOST = "the replica was lost, and the request is too long to be sent again: try again"
ELSEWHERE = "another replica answers in this conversation: try again"

MAX_LOST = 2
"""Replicas that a request may lose: one that ends each replica it reaches must not end them all."""
MAX_MOVES = 3
"""Times that a request follows its conversation to the owner."""

SUMMED_PATHS = PROBE_PATHS | {"/health", "/metrics"}
"""The paths whose answer is made of the answers of all replicas. They never wait for one."""

_OWN_HEADERS = {b"transfer-encoding", b"x-request-id", OWNER}  # the owner's has its secret


@dataclass(frozen=True)
class Want:
    """The needs of a request, for the choice of its replica.

    Attributes:
        key: what it continues, `conversation:ID` or `voice:NAME`; "" for nothing.
        excluded: names of the replicas that have failed it.
        patient: wait for a further replica if all are excluded.
    """

    key: str = ""
    excluded: tuple[str, ...] = ()
    patient: bool = True

    @property
    def is_conversation(self) -> bool:
        return self.key.startswith("conversation:")


@dataclass(frozen=True)
class Offer:
    """A replica's consent to serve a request.

    Attributes:
        replica: its name.
        address: of its server.
        ticket: see `Tickets`.
    """

    replica: str
    address: Address
    ticket: int


class Fleet(Protocol):
    """The replicas as a door sees them."""

    async def offer(self, want: Want) -> Offer:
        """The consent of the replica that should serve a request. It may wait for one.

        Raises:
            Exception: the chosen replica is lost.
        """

    def addresses(self) -> dict[str, Address]:
        """The servers of all replicas, by their names."""

    def slack(self, excluded: Sequence[str]) -> float:
        """Streams that other replicas can take at once."""


class Door:
    """Serves HTTP and WebSockets with the replicas of a cluster.

    Args:
        fleet: the replicas.
        config: their settings.

    Attributes:
        app: the ASGI application.
        draining: no request is begun any more.
    """

    def __init__(self, fleet: Fleet, config: Config) -> None:
        self.fleet, self.config = fleet, config
        self.draining = False
        self.is_warm = threading.Event()
        self.is_warm.set()
        self.on_failure: Callable[[], None] = lambda: None
        self._memory = KeptBytes()
        self._proxy_path = proxy_path(config.root_path)
        self._live_app = live_app(config)
        self._open: set[asyncio.Task[Any]] = set()
        self._stopping: asyncio.Task[None] | None = None
        self.app = CloseUnread(RequestIds(self._serve, {}))

    async def drain(self, within_s: float) -> None:
        """Let all replicas end what they have begun, and wait for that."""
        self.draining = True
        await self._tell(DRAIN)
        if open_now := self._open - {asyncio.current_task()}:
            await asyncio.wait(open_now, timeout=within_s)

    def request_stop(self) -> None:
        """Cut the requests that are open."""
        self._stopping = asyncio.ensure_future(self._tell(STOP))

    async def _tell(self, what: str) -> None:
        for address in self.fleet.addresses().values():
            await tell(address, what)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return
        if self._proxy_path:
            scope["root_path"] = self._proxy_path
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            with contextlib.suppress(ReplicaLostError):  # within an answer, which is then cut
                await self._answer(scope, receive, send)
        finally:
            self._open.discard(task)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.draining and route_path(scope) != "/health/live":
            await refuse(scope, receive, send, SHUTTING_DOWN, 1)
            return
        if scope["type"] == "websocket":
            from vox_serve.cluster.live_bridge import bridge

            await bridge(self, scope, receive, send)
            return
        path = route_path(scope)
        if scope["method"] in ("GET", "HEAD") and path in SUMMED_PATHS:
            if path == "/health/live":
                await self._live_app(scope, receive, send)
            elif not await summary(self, path, scope, receive, send):
                state = {"status": "failed", "reason": NO_REPLICA}
                await refuse(scope, receive, send, NO_REPLICA, RETRY_AFTER_S, state)
            return
        with contextlib.closing(Body(self._memory, scope, receive)) as body:
            await self._pass_on(scope, body, receive, send)

    async def _pass_on(self, scope: Scope, body: Body, receive: Receive, send: Send) -> None:
        want = Want(await body.key(route_path(scope)))
        owner: Address | None = None
        num_lost = num_moves = 0
        while not body.is_gone:
            offer = None
            if owner is None and (offer := await self.find(want)) is None:
                await refuse(scope, receive, send, NO_REPLICA, RETRY_AFTER_S)
                return
            address, ticket = (offer.address, offer.ticket) if offer else (owner, 0)
            assert address is not None
            name = offer.replica if offer else ""
            exchange = Exchange(scope, body, address, ticket)
            try:
                async with exchange as head:
                    found = dict(head.headers).get(OWNER, b"")
                    if found and (not body.is_kept or num_moves == MAX_MOVES):
                        await refuse(scope, receive, send, ELSEWHERE, RETRY_AFTER_S)
                        return
                    # An owner's 429 is the answer: no other replica has the conversation.
                    is_final = offer is None and head.status_code == 429
                    others = not is_final and self._others(head, want, name)
                    if not (body.is_kept and others):
                        await exchange.send_answer(head, send)
                        return
                    num_moves += bool(found)
                    owner = Address(*json.loads(found)) if found and offer else None
            except ReplicaLostError as error:
                if exchange.has_begun or body.is_gone:
                    raise
                num_lost += 1
                if not body.is_kept or num_lost > MAX_LOST:
                    await refuse(scope, receive, send, LOST, RETRY_AFTER_S)
                    return
                logger.warning("request %s is sent again: %s", current_id(), error)
                owner = None
            if name and owner is None:
                want = replace(want, excluded=(*want.excluded, name))

    def _others(self, head: h11.Response, want: Want, name: str) -> bool:
        """True if a replica's refusal should be tried elsewhere."""
        headers = dict(head.headers)
        if head.status_code == 421:
            return OWNER in headers
        if head.status_code not in (429, 503) or b"retry-after" not in headers:
            return False
        excluded = (*want.excluded, name)
        if not self.fleet.addresses().keys() - set(excluded):
            return False
        return head.status_code == 503 or self.fleet.slack(excluded) > 0

    async def find(self, want: Want) -> Offer | None:
        """The consent of a replica; None if there is none within `WAIT_S`."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    try:
                        return await self.fleet.offer(want)
                    except Exception as error:  # whatever the replica or Ray raised
                        logger.warning("a replica was lost before it took a request: %s", error)
                        await asyncio.sleep(0.05)
        except TimeoutError:
            return None


class Exchange:
    """One attempt to let a replica answer a request: within it, the head of the answer is there.

    Args:
        scope: of the request.
        body: of the request.
        address, ticket: where it goes.

    Attributes:
        has_begun: the client has got the beginning of this answer.
    """

    def __init__(self, scope: Scope, body: Body, address: Address, ticket: int) -> None:
        self._scope, self._body = scope, body
        self._address, self._ticket = address, ticket
        self._sending: asyncio.Task[None] | None = None
        self._may_send = asyncio.Event()
        self._upstream: Upstream | None = None
        self.has_begun = False

    async def __aenter__(self) -> h11.Response:
        try:
            return await self._ask()
        except BaseException:
            self._end()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
        if self._upstream is not None:
            self._upstream.close()

    async def _ask(self) -> h11.Response:
        scope = self._scope
        reader, writer = await connect(self._address, self._ticket, scope.get("client"))
        self._upstream = upstream = Upstream(reader, writer, scope["method"])
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        upstream.write_head(scope["method"], target, request_headers(scope))
        if not self._body.awaits_consent:
            self._may_send.set()
        self._sending = asyncio.ensure_future(self._body.send_to(upstream, self._may_send))
        while isinstance(head := await upstream.head(), h11.InformationalResponse):
            self._may_send.set()
        return head

    async def send_answer(self, head: h11.Response, send: Send) -> None:
        """Pass the answer on to the client.

        Raises:
            ReplicaLostError: the replica was lost within it.
        """
        assert self._upstream is not None
        self.has_begun = True
        headers = [(name, value) for name, value in head.headers if name not in _OWN_HEADERS]
        start = {"type": "http.response.start", "status": head.status_code, "headers": headers}
        await send(start)
        async for piece in self._upstream.body():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def tell(address: Address, what: str) -> None:
    """Tell a replica to `DRAIN` or to `STOP`; nothing happens if it is gone."""
    with contextlib.suppress(ReplicaLostError, OSError):
        _, writer = await connect(address, what, None)
        await writer.drain()
        writer.close()


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    detail: str,
    retry_after_s: int,
    state: Mapping[str, str] | None = None,
) -> None:
    """Answer 503, for /health with the state that it shows."""
    headers = {"Retry-After": str(retry_after_s)}
    answer: Any = AsciiJSONResponse({"detail": detail, **(state or {})}, 503, headers)
    if scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
        await answer(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1013})
