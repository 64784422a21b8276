"""An id for each HTTP request: in its answer, in its log lines, and in the ids of its speech."""

import re
import secrets
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"

STATE_KEY = "connection"
"""Key of the `GuardedProtocol` in the state of a request's scope."""

_HEADER_BYTES = HEADER.lower().encode()
_ACCEPTABLE = re.compile(rb"[!-~]{1,64}")  # printable ASCII without blanks

_current: ContextVar[str] = ContextVar("request_id", default="")


def current_id() -> str:
    """The id of the request that this task serves; "" outside of a request."""
    return _current.get()


def new_id() -> str:
    return secrets.token_hex(8)


class RequestIds:
    """ASGI middleware that gives each request an id: the client's own if it is short and printable.

    Each request has a task of its own, which keeps its id.

    Args:
        app: the application.
        statuses: counts the responses by status.
    """

    def __init__(self, app: "ASGIApp", statuses: MutableMapping[int, int]) -> None:
        self.app = app
        self._statuses = statuses

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == _HEADER_BYTES), b"")
        name = given.decode() if _ACCEPTABLE.fullmatch(given) else new_id()
        header = (_HEADER_BYTES, name.encode())

        async def send_with_id(message: "Message") -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                message = {**message, "headers": [*message.get("headers", ()), header]}
            connection = scope.get("state", {}).get(STATE_KEY)
            if message["type"] == "http.response.start" and not (
                connection is not None and connection.is_refused  # it was answered already
            ):
                status = message["status"]
                self._statuses[status] = self._statuses.get(status, 0) + 1
            await send(message)

        _current.set(
            name
        )  # until the request's task ends: the server may log an exception after it
        await self.app(scope, receive, send_with_id)
