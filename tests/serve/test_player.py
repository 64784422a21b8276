"""The player, with a fake sound device."""

import sys

import pytest

from fake_device import FakeDevice
from vox_serve.cli import CommandError
from vox_serve.player import Player


@pytest.fixture
def device(monkeypatch) -> FakeDevice:
    device = FakeDevice()
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    return device


def test_all_is_played_before_the_block_ends(device):
    device.may_write.clear()
    with Player() as player:
        for n in range(3):
            player.feed(bytes([n]) * 4)  # does not wait for the device
        assert device.played == b""
        device.may_write.set()
    assert device.played == b"\0\0\0\0\1\1\1\1\2\2\2\2"
    assert device.options == {"samplerate": 24_000, "channels": 1, "dtype": "int16"}
    assert device.events == ["start", "stop", "close"]


def test_the_tempo_may_change(device):
    class Twice:
        def feed(self, data: bytes) -> bytes:
            return 2 * data

        def close(self) -> bytes:
            return b"rest"

    with Player(Twice()) as player:
        player.feed(b"ab")
    assert device.played == b"ababrest"


def test_an_interrupt_stops_the_sound(device):
    device.may_write.clear()

    def interrupt():
        with Player() as player:
            player.feed(b"long")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert device.events == ["start", "abort", "close"]
    device.may_write.set()
    assert device.played == b""


def test_without_a_device(device):
    device.has_device = False
    with pytest.raises(CommandError, match="--play found no sound device: Error querying device"):
        Player()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(CommandError, match="pip install sounddevice"):
        Player()


def test_without_portaudio(monkeypatch, tmp_path):
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    with pytest.raises(CommandError, match="libportaudio2"):
        Player()
