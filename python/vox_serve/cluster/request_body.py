"""A request on its way to a replica: its headers and its body."""

import asyncio
import re

from starlette.types import Message, Receive, Scope

from vox_serve.cluster.upstream import Upstream
from vox_serve.request_id import current_id

MAX_KEPT_BYTES = 2**18
"""Longest body that is read before its request is sent, and kept until it is answered."""

MAX_ALL_KEPT_BYTES = 2**26

_BODY_KEYS = re.compile(
    rb'(?P<name>conversation|voice)(?:"\s*:\s*"|"\r\n\r\n|=)(?P<key>[A-Za-z0-9_.-]{1,64})'
)
_PATH_KEY = re.compile(r"/v1/conversations/([A-Za-z0-9_-]{1,64})(?:/|$)")


class KeptBytes:
    """The memory of all bodies that a door keeps.

    Attributes:
        total: bytes.
    """

    total = 0


class Body:
    """A request's body: a short one is kept until it is answered.

    Args:
        memory: bounds what is kept.
        scope: of the request.
        receive: gives the body.

    Attributes:
        is_kept: all that was read of it is still there.
        is_gone: the client has left.
        awaits_consent: the client sends it when it is told to.
    """

    def __init__(self, memory: KeptBytes, scope: Scope, receive: Receive) -> None:
        self._memory, self._receive = memory, receive
        headers = dict(scope["headers"])
        self._is_chunked = b"transfer-encoding" in headers
        length = headers.get(b"content-length", b"")
        self.num_bytes = int(length) if length.isdigit() else None
        self.awaits_consent = any(
            name == b"expect" and value.lower() == b"100-continue"
            for name, value in scope["headers"]
        )
        self._pieces: list[bytes] = []
        self._kept_bytes = 0
        self._is_complete = not self._is_chunked and not self.num_bytes
        self.is_kept, self.is_gone = True, False

    def close(self) -> None:
        self._forget()

    async def key(self, path: str) -> str:
        """Key of what the request continues; see `Want`. A short body is read for it."""
        if in_path := _PATH_KEY.match(path):
            return f"conversation:{in_path[1]}"
        if self.awaits_consent or (self.num_bytes or 0) > MAX_KEPT_BYTES:
            return ""
        while self.is_kept and not self._is_complete and not self.is_gone:
            await self._read()
        found: dict[bytes, str] = {}
        for match in _BODY_KEYS.finditer(b"".join(self._pieces)):
            found.setdefault(match["name"], match["key"].decode())
        for name in (b"conversation", b"voice"):
            if name in found:
                return f"{name.decode()}:{found[name]}"
        return ""

    async def send_to(self, upstream: Upstream, may_send: asyncio.Event) -> None:
        """Send the body, as it comes, and end the exchange when the client leaves."""
        await may_send.wait()
        pieces = list(self._pieces)
        while True:
            for piece in pieces:
                await upstream.write(
                    b"%x\r\n%s\r\n" % (len(piece), piece) if self._is_chunked else piece
                )
            if self._is_complete or self.is_gone:
                break
            pieces = [await self._read()]
        if self._is_chunked and not self.is_gone:
            await upstream.write(b"0\r\n\r\n")
        while not self.is_gone:
            self._take(await self._receive())
        upstream.close()

    async def _read(self) -> bytes:
        piece = b""
        while not (piece or self._is_complete or self.is_gone):
            piece = self._take(await self._receive())
        return piece

    def _take(self, message: Message) -> bytes:
        if message["type"] == "http.disconnect":
            self.is_gone = True
            return b""
        piece: bytes = message.get("body", b"")
        self._is_complete = self._is_complete or not message.get("more_body", False)
        if self.is_kept and piece:
            self._pieces.append(piece)
            self._kept_bytes += len(piece)
            self._memory.total += len(piece)
            too_long = self._kept_bytes > MAX_KEPT_BYTES
            if too_long or self._memory.total > MAX_ALL_KEPT_BYTES:
                self.is_kept = False
        return piece

    def _forget(self) -> None:
        self._memory.total -= self._kept_bytes
        self._kept_bytes = 0
        self._pieces = []


def request_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The headers of a request for a replica, with the id that the door gave it."""
    own = (b"x-request-id", b"connection", b"keep-alive", b"upgrade")
    headers = [(name, value) for name, value in scope["headers"] if name not in own]
    if all(name != b"host" for name, _ in headers):  # HTTP/1.0 needs none
        headers.append((b"host", b"localhost"))
    return [*headers, (b"x-request-id", current_id().encode())]
