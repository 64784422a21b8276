"""A client's WebSocket and the one to a replica, joined."""

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from vox_serve.cluster.door import NO_REPLICA, RETRY_AFTER_S, Offer, Want, refuse
from vox_serve.cluster.request_body import request_headers
from vox_serve.cluster.upstream import CONNECT_TIMEOUT_S, connected_socket

if TYPE_CHECKING:
    from vox_serve.cluster.door import Door

CLOSE_LOST = 1012
"""Close code when the replica is lost: connect again."""

OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
MAX_WAITING = 8
"""Messages of the replica that wait for the client; then the replica waits."""

_UNSENDABLE = (1005, 1006, 1015)
_HANDSHAKE = (b"sec-websocket-", b"host", b"content-length", b"transfer-encoding")


async def bridge(door: "Door", scope: Scope, receive: Receive, send: Send) -> None:
    """Serve a WebSocket with one replica, until either side ends it."""
    await receive()  # websocket.connect
    want = Want()
    while (offer := await door.find(want)) is not None:
        try:
            upstream = await _open(offer, scope)
        except InvalidStatus as refusal:
            answer = refusal.response
            if answer.status_code == 503 and len(door.fleet.addresses()) > 1 + len(want.excluded):
                want = Want(excluded=(*want.excluded, offer.replica))
                continue
            await _deny(scope, receive, send, answer)
            return
        except InvalidURI:  # a Host that is none
            await _deny(scope, receive, send, None)
            return
        except (OSError, TimeoutError, InvalidHandshake):
            want = Want(excluded=(*want.excluded, offer.replica))
            continue
        async with upstream:
            headers = [
                (name.lower().encode(), value.encode("latin-1"))
                for name, value in (
                    upstream.response.headers.raw_items() if upstream.response else ()
                )
                if not name.lower().startswith(("sec-websocket", "x-request-id", "upgrade"))
                and name.lower() not in ("connection", "date", "server")
            ]
            chosen = upstream.subprotocol
            await send({"type": "websocket.accept", "subprotocol": chosen, "headers": headers})
            await _join(upstream, receive, send)
        return
    await refuse(scope, receive, send, NO_REPLICA, RETRY_AFTER_S)


async def _open(offer: Offer, scope: Scope) -> ClientConnection:
    """The WebSocket to a replica, with the client's own handshake."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        raw = await connected_socket(offer.address)
        await loop.sock_sendall(raw, offer.address.preface(offer.ticket, scope.get("client")))
    headers = request_headers(scope)
    host = next((value for name, value in headers if name == b"host"), b"localhost")
    query = scope["query_string"]
    target = scope["raw_path"] + (b"?" + query if query else b"")
    return await connect(
        f"ws://{host.decode('latin-1')}{target.decode('latin-1')}",
        sock=raw,
        additional_headers=[
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in headers
            if not name.startswith(_HANDSHAKE)
        ],
        subprotocols=scope.get("subprotocols") or None,
        user_agent_header=None,
        compression=None,
        max_size=None,
        max_queue=MAX_WAITING,
        ping_interval=None,
        proxy=None,
        open_timeout=OPEN_TIMEOUT_S,
        close_timeout=CLOSE_TIMEOUT_S,
    )


async def _join(upstream: ClientConnection, receive: Receive, send: Send) -> None:
    async def up() -> None:
        while (message := await receive())["type"] == "websocket.receive":
            text = message.get("text")
            try:
                await upstream.send(message["bytes"] if text is None else text)
            except ConnectionClosed:  # `down` tells the client
                await tasks[1]
                return
        code = message.get("code") or 1005
        if code in _UNSENDABLE:
            upstream.transport.abort()
        else:
            await upstream.close(code, message.get("reason") or "")

    async def down() -> None:
        try:
            while True:
                message = await upstream.recv()
                kind = "text" if isinstance(message, str) else "bytes"
                await send({"type": "websocket.send", kind: message})
        except ConnectionClosed as closed:
            got = closed.rcvd
            code, reason = (got.code, got.reason) if got else (CLOSE_LOST, "the replica was lost")
            if code in _UNSENDABLE:
                code = 1000
            await send({"type": "websocket.close", "code": code, "reason": reason})

    tasks = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _deny(scope: Scope, receive: Receive, send: Send, answer: Any) -> None:
    """Refuse the handshake as the replica did."""
    if answer is None or "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})  # answered 403
        return
    headers = {
        name: value
        for name, value in answer.headers.raw_items()
        if name.lower() not in ("connection", "content-length", "x-request-id", "date", "server")
    }
    await Response(answer.body or b"", answer.status_code, headers)(scope, receive, send)
