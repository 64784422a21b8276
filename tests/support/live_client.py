"""A client of the WebSocket, for tests."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from websockets.sync.client import ClientConnection, connect

from fake_engine import TIMEOUT_S

PATH = "/v1/audio/speech/stream"


class LiveClient:
    """Sends messages, and sorts what comes.

    Attributes:
        audio: the samples of each turn, as bytes.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.audio: dict[int, bytes] = {}
        self._turn = 0

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def write(self, fragments: Iterable[str], end: bool = True) -> None:
        for fragment in fragments:
            self.send("text", text=fragment)
        if end:
            self.send("end")

    def event(self) -> dict[str, Any]:
        """The next event; audio before it is kept."""
        while True:
            message = self.socket.recv(TIMEOUT_S)
            if isinstance(message, bytes):
                self.audio[self._turn] = self.audio.get(self._turn, b"") + message
                continue
            event = json.loads(message)
            if event["type"] == "sentence.begin":
                self._turn = event["turn"]
            return event

    def events(self, until: str) -> list[dict[str, Any]]:
        """Events until one of this type, which is the last one."""
        found = [self.event()]
        while found[-1]["type"] != until:
            found.append(self.event())
        return found

    def speak(self, fragments: Iterable[str]) -> dict[str, Any]:
        """Speak a turn; return its last event."""
        self.write(fragments)
        return self.events("turn.done")[-1]


@contextmanager
def live_client(port: int, **options: Any) -> Iterator[LiveClient]:
    """A connection to a server on this machine."""
    url = f"ws://127.0.0.1:{port}{PATH}"
    options = {"proxy": None, "open_timeout": TIMEOUT_S, "compression": None} | options
    with connect(url, **options) as socket:
        yield LiveClient(socket)
