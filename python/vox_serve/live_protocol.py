"""uvicorn's WebSocket protocol, imported with the first WebSocket, and hardened."""

import asyncio
import functools
from typing import Any

PING_S = 20.0
"""Time between two pings, and for the answer to each: a client that is gone is noticed by then."""

CLOSE_GRACE_S = 1.0
"""Time that a stopping server gives its application to end a connection properly."""


@functools.cache
def _protocol_class() -> Any:
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    class LiveProtocol(WebSocketsSansIOProtocol):
        def send_receive_event_to_app(self) -> None:
            if self.curr_msg_data_type == "text" and not self.close_sent:
                try:
                    b"".join(self.frames).decode()
                except UnicodeDecodeError:  # uvicorn would log a traceback
                    self.conn.fail(1007, "invalid UTF-8")
                    self.handle_parser_exception()
                    return
            super().send_receive_event_to_app()

        def handle_ping(self) -> None:
            # A client that pings and does not read gets no further answers.
            output = self.conn.data_to_send()
            if self.writable.is_set():
                self.transport.write(b"".join(output))

        async def send(self, message: Any) -> None:
            await super().send(message)
            if message["type"] == "websocket.http.response.body":
                self.handshake_complete = True  # or uvicorn would log an error

        def shutdown(self) -> None:
            if self.handshake_complete and not self.close_sent:
                self.loop.call_later(CLOSE_GRACE_S, self._end)
            else:
                super().shutdown()

        def _end(self) -> None:
            if not self.disconnected:
                super().shutdown()

    return LiveProtocol


def live_protocol(**arguments: Any) -> asyncio.Protocol:
    """The protocol of a connection that becomes a WebSocket."""
    protocol: asyncio.Protocol = _protocol_class()(**arguments)
    return protocol
