"""A sound device that keeps what it plays, in place of the package sounddevice."""

import threading
from types import SimpleNamespace

from fake_engine import TIMEOUT_S


class FakeDevice:
    """sounddevice's interface, as far as it is used."""

    class PortAudioError(Exception):
        pass

    def __init__(self, has_device: bool = True):
        self.has_device = has_device
        self.events: list[str] = []
        self.played = b""
        self.options: dict = {}
        self.may_write = threading.Event()
        self.may_write.set()

    def RawOutputStream(self, **options):  # noqa: N802
        if not self.has_device:
            raise self.PortAudioError("Error querying device -1")
        self.options = options

        def note(name):
            return lambda: self.events.append(name)

        names = {name: note(name) for name in ("start", "stop", "abort", "close")}
        return SimpleNamespace(write=self.write, **names)

    def write(self, pcm: bytes) -> None:
        assert self.may_write.wait(TIMEOUT_S)
        if "abort" in self.events:
            raise self.PortAudioError("Stream is stopped")
        self.played += pcm
