"""Answers a client's errors at a bounded rate, so that retrying without a pause gains nothing.

Each refused or malformed request costs the event loop some milliseconds, which it takes from the
engine. So of one client's 4xx answers only a burst goes out at once; each further one waits for its
turn. Everything else is answered at once, to this client too.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vox_serve.access import client_name
from vox_serve.request_id import STATE_KEY

BURST = 100
"""Errors of a client that are answered at once, if it had none for a while."""


class PacedErrors:
    """ASGI middleware that delays 4xx answers by their clients' `ErrorPace`."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope.get("state", {}).get(STATE_KEY)
        if scope["type"] != "http" or connection is None:
            return await self.app(scope, receive, send)

        async def send_in_turn(message: Message) -> None:
            if message["type"] == "http.response.start" and 400 <= message["status"] < 500:
                await connection.wait_for_turn(client_name(scope))
            await send(message)

        await self.app(scope, receive, send_in_turn)
