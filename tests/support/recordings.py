"""Recordings for tests of uploads."""

import numpy as np

from vox_serve.audio import pcm16, wav_file


def tone(level: float = 0.5, seconds: float = 0.8) -> bytes:
    """A tone of 440 Hz at 24 kHz as a WAV file."""
    t = np.arange(int(seconds * 24_000)) / 24_000
    return wav_file(pcm16(level * np.sin(2 * np.pi * 440 * t)).tobytes())
