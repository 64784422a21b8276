"""Answers a client's errors at a bounded rate, so that retrying without a pause gains nothing.

Each refused or malformed request costs the event loop some milliseconds, which it takes from the
engine. So of one client's 4xx answers only a burst goes out at once; each further one waits for its
turn. Everything else is answered at once, to this client too.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vox_serve.access import client_name
from vox_serve.guarded_protocol import STATE_KEY

BURST = 100
"""Errors of a client that are answered at once, if it had none for a while."""

MAX_DELAY_S = 10.0
MAX_CLIENTS = 4096
"""Clients whose errors are remembered; beyond that, the one whose last error is oldest is not."""


class ErrorPace:
    """Times at which each client's next errors may be answered: a data structure without a clock.

    Args:
        per_s: errors a second of one client; 0 for no limit.
    """

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        # The time at which a client has no errors on its account, the oldest last error first.
        self._free_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._free_at)

    def delay_s(self, client: str, now: float) -> float:
        """Count an error of a client; return the time that its answer must wait."""
        if not self.per_s:
            return 0.0
        burst_s = BURST / self.per_s
        free_at = max(self._free_at.pop(client, now), now) + 1 / self.per_s
        self._free_at[client] = min(free_at, now + burst_s + MAX_DELAY_S)
        oldest = next(iter(self._free_at))
        if len(self) > MAX_CLIENTS or self._free_at[oldest] <= now:
            del self._free_at[oldest]
        return min(max(0.0, free_at - now - burst_s), MAX_DELAY_S)


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
