"""Samples to 16-bit PCM and WAV, and audio files to samples."""

import struct
from pathlib import Path

import numpy as np

SAMPLE_RATE_HZ = 24_000
UNKNOWN_SIZE_BYTES = 0xFFFFFFFF
"""Data size of a WAV whose end is not known yet.

It is what ffmpeg writes to a pipe, and "read to the end" to ffmpeg (and so Chrome). The stdlib's
`wave`, libsndfile and scipy cut it to what is there. With 0, `wave` finds no file and libsndfile
an empty one.
"""


class AudioError(ValueError):
    """A file holds no audio that can be read; the message says which and why."""


def pcm16(audio: np.ndarray) -> np.ndarray:
    """Samples as 16-bit integers: `audio * 32768`, rounded half to even, clamped.

    The scale is the one that readers of WAV divide by, so an unclipped sample comes back within
    2**-16. NaN is silence.

    Args:
        audio: float, any shape; full scale is -1 to 1.

    Returns:
        Little-endian int16 of the same shape.
    """
    scaled = np.rint(np.nan_to_num(audio, nan=0.0, posinf=1.0, neginf=-1.0) * np.float32(32768))
    return np.clip(scaled, -32768, 32767).astype("<i2")


def wav_header(data_bytes: int | None, sample_rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """The 44 bytes before the samples of a mono 16-bit WAV.

    Args:
        data_bytes: how many bytes of samples follow; None if that is not known yet.
        sample_rate_hz: of the samples.
    """
    size = UNKNOWN_SIZE_BYTES if data_bytes is None else data_bytes
    riff_size = min(size + 36, UNKNOWN_SIZE_BYTES)
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
    """A whole mono WAV of 16-bit little-endian samples; of none at all, too."""
    return wav_header(len(pcm), sample_rate_hz) + pcm


def read_audio(path: str | Path, sample_rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """An audio file's samples, mixed to mono and resampled.

    Args:
        path: anything that libsndfile reads (WAV, FLAC, OGG, MP3, ...).
        sample_rate_hz: of the result.

    Returns:
        `[S]` float32, contiguous.

    Raises:
        FileNotFoundError: there is no such file.
        AudioError: it holds no audio.
    """
    import soundfile
    import soxr

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such audio file: {path}")
    try:
        channels, file_rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless by its name
        reason = getattr(error, "error_string", error)
        raise AudioError(f"cannot read audio from {path}: {reason}") from None
    if not len(channels):
        raise AudioError(f"{path} holds no samples")
    if not np.isfinite(channels).all():
        raise AudioError(f"{path} holds samples that are no numbers")
    mono = channels.mean(axis=1)
    if file_rate_hz != sample_rate_hz:
        mono = soxr.resample(mono, file_rate_hz, sample_rate_hz)
    return np.ascontiguousarray(mono, dtype=np.float32)
