"""uvicorn's HTTP protocol, with what `ConnectionGuard` must know and do about a connection."""

import asyncio
import contextlib
import json
import logging
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from vox_serve.access import client_name
from vox_serve.bounded_h11 import BoundedConnection
from vox_serve.openai_errors import error_object, has_openai_shape
from vox_serve.request_id import HEADER, STATE_KEY, new_id

if TYPE_CHECKING:
    from vox_serve.connections import ConnectionGuard

logger = logging.getLogger("vox_serve")

MIN_BODY_BYTES_PER_S = 16_384
"""A body that arrives at this rate is not cut, however long it takes."""

LINGER_S = 2.0
"""Time that a client has to notice an answer that came before the end of its request."""

LINGER_BYTES = 2**20
"""Input that is read and dropped meanwhile."""

MAX_HEAD_BYTES = 65_536
PIECE_BYTES = 16_384
"""Input that is parsed at a time."""

MAX_UNSENT_BYTES = 131_072
"""Audio that the kernel buffers for a client, beyond what the client's own kernel holds.

By default it takes megabytes from a slow client's stream, and then nothing for half a minute: the
client would seem to have stopped reading.
"""

_STATUS_LINE = b"HTTP/1.1 "
"""Start of every response: what a probe may send before the response is known."""

_TCP_CLOSE_WAIT = 8  # of Linux's TCP_INFO


class GuardedTransport:
    """A connection's transport that counts what is read, and lingers when it is closed early."""

    def __init__(self, transport: asyncio.Transport, protocol: "GuardedProtocol"):
        self.inner = transport
        self._protocol = protocol
        self._num_written = 0
        self._num_probes = 0
        self._num_read = 0
        self._read_at = protocol.loop.time()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def write(self, data: bytes) -> None:
        if self._num_probes:
            data = data[self._num_probes :]  # the client has this much of the status line
            self._num_probes = 0
        self._num_written += len(data)
        self.inner.write(data)
        if self._protocol.is_half_closed:
            self._protocol.end_if_reset()

    def writelines(self, pieces: Any) -> None:
        self.write(b"".join(pieces))

    def probe(self) -> None:
        """Send the next byte of the status line, if there is one that is certain."""
        byte = _STATUS_LINE[self._num_probes : self._num_probes + 1]
        self._num_probes += len(byte)
        self.inner.write(byte)

    def close(self) -> None:
        if self._protocol.is_receiving and not self._protocol.is_half_closed:
            self._protocol.linger()
        else:
            self.inner.close()

    def is_closing(self) -> bool:
        return self._protocol.is_lingering or self.inner.is_closing()

    def stalled_s(self, now: float) -> float:
        """Time since the client last read anything that was sent to it; 0 if it read all.

        Call this about once a second: it compares with the call before.
        """
        unread = self.inner.get_write_buffer_size()
        if unread == 0 or self._num_written - unread != self._num_read:
            self._num_read = self._num_written - unread
            self._read_at = now
        return now - self._read_at


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol on h11; `guard` is an attribute of a subclass.

    Never on httptools, which uvicorn prefers where it is installed: uvicorn then sends chunks to
    HTTP/1.0 clients, does not bound a request's head, and overlooks that a client is gone if it had
    sent a second request.
    """

    guard: "ConnectionGuard"
    transport: Any  # GuardedTransport
    is_refused: bool  # it answers, or has answered, instead of the application

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.conn = BoundedConnection(MAX_HEAD_BYTES)
        self.is_lingering = False
        self.is_half_closed = False
        self.is_refused = False
        self._num_bytes = 0  # received
        self._head_start = 0  # `_num_bytes` when the last response was complete
        self._phase: tuple[str, Any] = ("head", None)
        self._phase_at = self.loop.time()
        self._phase_start = 0  # `_num_bytes` then
        self._linger_timer: asyncio.TimerHandle | None = None
        self._turn: asyncio.Future[None] | None = None  # of an error that has to wait
        self._refusal = ""  # the error, if it is not the application's
        self.app_state = {**self.app_state, STATE_KEY: self}
        guarded = GuardedTransport(cast(asyncio.Transport, transport), self)
        connected = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with contextlib.suppress(OSError):  # not TCP, or gone already
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
        super().connection_made(cast(asyncio.Transport, guarded))
        self.guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.forget(self)
        if self._linger_timer:
            self._linger_timer.cancel()
        self.end_wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        if self.is_lingering or self.is_refused:
            if self._num_bytes - self._phase_start > LINGER_BYTES:
                self.flow.pause_reading()
            return
        self.guard.heard(self)
        # In pieces: h11 bounds a head, or a trailer, only while it is incomplete.
        for start in range(0, len(data), PIECE_BYTES):
            if not self.is_refused and self.transport.get_protocol() is self:
                super().data_received(data[start : start + PIECE_BYTES])

    def eof_received(self) -> bool:  # type: ignore[override]
        super().eof_received()
        if self._refusal and self.is_waiting_for_turn:
            self._half_close()
            return True
        # A request that has arrived gets its answer. Otherwise asyncio closes the connection, after
        # sending what was written.
        if self.is_lingering or self._is_between_requests or self.cycle.more_body:
            return False
        self._half_close()
        return True

    def handle_websocket_upgrade(self, event: Any) -> None:
        self.guard.forget(self)
        super().handle_websocket_upgrade(event)

    def send_400_response(self, reason: str) -> None:
        if self._turn_of(client_name({"client": self.client})):
            self.is_refused = True
            self._refusal = reason
        else:
            self.answer_and_close(400, reason)

    async def wait_for_turn(self, client: str) -> None:
        """Wait until an error of this client may be answered, or the connection is lost."""
        if self.transport.is_closing():  # nobody reads it: the client gave its request up
            return
        if turn := self._turn_of(client):
            await turn

    def end_wait(self) -> None:
        """Send an error now that waits for its turn."""
        if self._turn and not self._turn.done():
            self._turn.set_result(None)
            if self._refusal:
                self.answer_and_close(400, self._refusal)

    def _turn_of(self, client: str) -> "asyncio.Future[None] | None":
        if self.is_waiting_for_turn:  # an error within the body of a request that was refused
            return self._turn
        delay_s = self.guard.pace.count(client, self.loop.time())
        if not delay_s:
            return None
        self._turn = self.loop.create_future()
        self.loop.call_later(delay_s, self.end_wait)
        return self._turn

    @property
    def is_waiting_for_turn(self) -> bool:
        """True if an error is not sent yet, because its client had too many."""
        return self._turn is not None and not self._turn.done()

    def on_response_complete(self) -> None:
        self._head_start = self._num_bytes
        super().on_response_complete()
        if self.is_half_closed and self._is_between_requests:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        """uvicorn's timer, which counts from before the client has read the answer: not used."""

    @property
    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_receiving(self) -> bool:
        """True if the client may still be sending the request that was read last."""
        return self.is_refused or (self.cycle is not None and self.cycle.more_body)

    @property
    def is_waiting_for_client(self) -> bool:
        """True if no complete request is in flight and all answers were taken.

        A request whose error waits for its turn is not in flight.
        """
        if self.is_waiting_for_turn:
            return True
        if not self._is_between_requests:
            return bool(self.cycle.more_body)
        return self.transport.get_write_buffer_size() == 0

    @property
    def is_waiting_for_reader(self) -> bool:
        """True if the answer, or as much of it as may be buffered, waits to be read."""
        has_unread = self.transport.get_write_buffer_size() > 0
        return has_unread and (self._is_between_requests or self.flow.write_paused)

    def check(self, now: float) -> None:
        """End the connection if its client took too long. Called about once a second."""
        if self.transport.is_closing():
            return
        if self.is_waiting_for_turn:
            if self.is_half_closed and now >= self._probe_at:
                self._probe()
            return
        config = self.guard.config
        name = self._phase_name()
        if (name, self.cycle) != self._phase:
            self._phase = (name, self.cycle)
            self._phase_at, self._phase_start = now, self._num_bytes
        waited_s = now - self._phase_at
        num_bytes = self._num_bytes - self._phase_start
        if name == "idle" and waited_s > config.keep_alive_s:
            self.transport.close()
        elif name == "head" and waited_s > config.header_timeout_s:
            self._time_out("the request's head")
        elif name == "body" and waited_s > config.body_timeout_s + num_bytes / MIN_BODY_BYTES_PER_S:
            self._time_out("the request's body")
        elif name == "answer":
            self.end_if_reset()
            if not self.is_half_closed and self.flow.read_paused and self._has_unseen_eof():
                self._half_close()
            elif self.is_half_closed and now >= self._probe_at:
                self._probe()

    def _phase_name(self) -> str:
        if not self._is_between_requests:
            return "body" if self.cycle.more_body else "answer"
        if self.transport.get_write_buffer_size():
            return "reading"
        return "idle" if self.cycle and self._num_bytes == self._head_start else "head"

    def _time_out(self, part: str) -> None:
        self.guard.counts["timeout"] += 1
        logger.warning("dropped a client: %s did not arrive in time", part)
        if self._num_bytes == self._head_start:  # it never sent anything
            self.transport.close()
        else:
            self.answer_and_close(408, f"{part} did not arrive in time")

    def answer_and_close(self, status: int, detail: str, *headers: str) -> None:
        """Answer without the application, and close; only close if a response has begun."""
        if self.transport.is_closing():
            return
        self.is_refused = True
        if self._is_between_requests or not self.cycle.response_started:
            fields: dict[str, Any] = {"detail": detail}
            if self._is_between_requests or has_openai_shape(self.scope):  # or it may be
                fields |= error_object(status, detail)
            body = json.dumps(fields)
            self.guard.count(status)
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                "Connection: close",
                f"{HEADER}: {new_id()}",
                *headers,
            )
            self.transport.write("\r\n".join([*head, "", body]).encode())
        self.transport.close()

    def linger(self) -> None:
        """Close the sending side, and drop input for a while before closing the rest."""
        if self.is_lingering:
            return
        self.is_lingering = True
        self._phase_start = self._num_bytes
        if not self._is_between_requests:  # the application sees the client as gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        inner = self.transport.inner
        if not inner.is_closing():
            with contextlib.suppress(OSError):  # the client is gone
                inner.write_eof()
            self._linger_timer = self.loop.call_later(LINGER_S, inner.close)

    def end_if_reset(self) -> None:
        """Abort the connection if the client reset it. asyncio only notices when it reads."""
        connected = self.transport.get_extra_info("socket")
        if connected.fileno() >= 0 and connected.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()

    def _has_unseen_eof(self) -> bool:
        """True if the client has closed its side, but sent more than the request before that.

        The rest is not read before the answer is complete, and so asyncio does not see the end.
        """
        if not hasattr(socket, "TCP_INFO"):
            return False
        connected = self.transport.get_extra_info("socket")
        state = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return bool(state == _TCP_CLOSE_WAIT)

    def _half_close(self) -> None:
        self.is_half_closed = True
        self._probe_gap_s = 0.5
        self._probe()

    def _probe(self) -> None:
        """Find out whether a client that sends no more still reads.

        A client that is gone answers any byte with a reset. Before the response the first bytes of
        its status line serve, since they are always the same; within it, each chunk serves.
        """
        self._probe_gap_s *= 2
        self._probe_at = self.loop.time() + self._probe_gap_s
        if self._is_between_requests or not self.cycle.response_started:
            self.transport.probe()
        for delay_s in (0.01, 0.1, 0.4):  # then once a second, by `check`
            self.loop.call_later(delay_s, self.end_if_reset)
