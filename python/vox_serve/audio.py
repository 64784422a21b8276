"""Converts samples to 16-bit PCM and WAV."""

import struct

import numpy as np

from vox_serve.formats import SAMPLE_RATE_HZ as SAMPLE_RATE_HZ

UNKNOWN_SIZE_BYTES = 0xFFFFFFFF
"""Data size in the header of a WAV whose length is not known yet.

ffmpeg writes it to pipes and, like Chrome, reads it as "until the end". The stdlib's `wave`,
libsndfile and scipy truncate it to the data present. With 0, `wave` rejects the file and libsndfile
finds it empty.
"""


def pcm16(audio: np.ndarray) -> np.ndarray:
    """Convert samples to 16-bit integers: `audio * 32768`, rounded half to even, clamped.

    WAV readers divide by the same scale, so an unclipped sample survives the round trip to within
    2**-16. NaN becomes silence.

    Args:
        audio: float, any shape; full scale is -1 to 1.

    Returns:
        Little-endian int16 of the same shape.
    """
    scaled = np.rint(np.nan_to_num(audio, nan=0.0, posinf=1.0, neginf=-1.0) * np.float32(32768))
    return np.clip(scaled, -32768, 32767).astype("<i2")


def wav_header(
    data_bytes: int | None, sample_rate_hz: int = SAMPLE_RATE_HZ, more_bytes: int = 0
) -> bytes:
    """The 44-byte header of a mono 16-bit WAV.

    Args:
        data_bytes: size of the samples that follow; None if it is not known yet.
        sample_rate_hz: sample rate.
        more_bytes: size of the chunks after the samples.
    """
    size = UNKNOWN_SIZE_BYTES if data_bytes is None else data_bytes
    riff_size = min(size + 36 + more_bytes, UNKNOWN_SIZE_BYTES)
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        b"RIFF",
        riff_size,
        b"WAVE",
        b"fmt ",
        16,
        1,  # PCM
        1,  # channel
        sample_rate_hz,
        sample_rate_hz * 2,  # bytes per second
        2,  # bytes per sample
        16,  # bits per sample
        b"data",
        size,
    )


def wav_file(pcm: bytes, sample_rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """A complete mono WAV of 16-bit little-endian samples, possibly none."""
    return wav_header(len(pcm), sample_rate_hz) + pcm
