"""Plays speech on this machine's sound device while it is made."""

import queue
import threading
from typing import TYPE_CHECKING, Any

from vox_serve.audio import SAMPLE_RATE_HZ
from vox_serve.cli import CommandError

if TYPE_CHECKING:
    from vox_serve.encoders import Stage

CLOSE_POLL_S = 0.1
"""So that an interrupt from the keyboard is noticed while the rest is played."""


class Player:
    """Plays mono 16-bit PCM; use it inside `with`, which ends when all of it has been played.

    An exception in the block, such as an interrupt, stops the sound at once.

    Args:
        shaper: changes the tempo; None to leave it.

    Raises:
        CommandError: the package sounddevice, the library PortAudio or a sound device is missing.
    """

    def __init__(self, shaper: "Stage | None" = None) -> None:
        try:
            import sounddevice
        except ImportError:
            raise CommandError(
                "--play needs the package sounddevice: pip install sounddevice"
            ) from None
        except OSError:
            raise CommandError(
                "--play needs the library PortAudio (Debian's package: libportaudio2)"
            ) from None
        try:
            self._stream: Any = sounddevice.RawOutputStream(
                samplerate=SAMPLE_RATE_HZ, channels=1, dtype="int16"
            )
        except sounddevice.PortAudioError as error:
            raise CommandError(f"--play found no sound device: {error}") from None
        self._shaper = shaper
        # The model goes on while the device takes what is there.
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._play, name="player", daemon=True)

    def feed(self, pcm: bytes) -> None:
        """Play PCM at 24 kHz after all that was fed before. Never waits for the device."""
        self._queue.put(self._shaper.feed(pcm) if self._shaper else pcm)

    def __enter__(self) -> "Player":
        self._stream.start()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            if self._shaper:
                self._queue.put(self._shaper.close())
            self._queue.put(None)
            while self._thread.is_alive():
                self._thread.join(CLOSE_POLL_S)
            self._stream.stop()  # after the last sample
        else:
            self._stream.abort()
        self._stream.close()

    def _play(self) -> None:
        while (pcm := self._queue.get()) is not None:
            try:
                self._stream.write(pcm)
            except Exception:  # the device is gone, or the block was left
                return
