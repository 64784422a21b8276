"""Converts samples to 16-bit PCM and WAV, and audio files to samples."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_RATE_HZ = 24_000
UNKNOWN_SIZE_BYTES = 0xFFFFFFFF
"""Data size in the header of a WAV whose length is not known yet.

ffmpeg writes it to pipes and, like Chrome, reads it as "until the end". The stdlib's `wave`,
libsndfile and scipy truncate it to the data present. With 0, `wave` rejects the file and libsndfile
finds it empty.
"""

FILE_RATES_HZ = (1_000, 384_000)
"""Sample rates of recordings that are read; the resampler's filters grow with the ratio."""
MAX_CHANNELS = 64
MAX_SAMPLES = 2**27
"""Most samples of a recording, before and after resampling: 512 MiB, or 46 minutes at 48 kHz."""
MAX_LEVEL = 65_536
"""Largest sample that is read: full scale is 1, but some tools write 16-bit values as floats."""
_BLOCK_SAMPLES = 1 << 16  # read at a time: 16 MiB with all channels


class AudioError(ValueError):
    """A file has no readable audio; the message names the file and the reason."""


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


def wav_header(data_bytes: int | None, sample_rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """The 44-byte header of a mono 16-bit WAV.

    Args:
        data_bytes: size of the samples that follow; None if it is not known yet.
        sample_rate_hz: sample rate.
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
    """A complete mono WAV of 16-bit little-endian samples, possibly none."""
    return wav_header(len(pcm), sample_rate_hz) + pcm


def read_audio(
    path: str | Path, sample_rate_hz: int = SAMPLE_RATE_HZ, max_s: float = math.inf
) -> np.ndarray:
    """Read an audio file's samples, mixed to mono and resampled.

    The file is decoded in blocks, so memory follows the seconds, whatever its header says and
    however well it is compressed.

    Args:
        path: a file in any format that libsndfile reads (WAV, FLAC, OGG, MP3, ...).
        sample_rate_hz: sample rate of the result.
        max_s: longest recording that is accepted; `MAX_SAMPLES` holds too.

    Returns:
        `[S]` float32, contiguous.

    Raises:
        FileNotFoundError: there is no such file.
        AudioError: it has no readable audio, or a rate, a number of channels, a length or a sample
            beyond the bounds.
    """
    import soundfile
    import soxr

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such audio file: {path}")
    try:
        with soundfile.SoundFile(path) as file:
            file_rate_hz = file.samplerate
            _check_format(path, file_rate_hz, file.channels)
            mono = _read_mono(
                path, file, min(max_s, MAX_SAMPLES / max(file_rate_hz, sample_rate_hz))
            )
    except (
        soundfile.LibsndfileError,
        TypeError,
        OverflowError,
    ) as error:  # TypeError: a headerless format, by the file's name
        reason = getattr(error, "error_string", error)
        raise AudioError(f"cannot read audio from {path}: {reason}") from None
    if file_rate_hz != sample_rate_hz:
        mono = soxr.resample(mono, file_rate_hz, sample_rate_hz)
    if not len(mono):  # a few samples at a high rate are none at a lower one
        raise AudioError(f"{path} holds no samples")
    return np.ascontiguousarray(mono, dtype=np.float32)


def _check_format(path: str | Path, rate_hz: int, channels: int) -> None:
    low, high = FILE_RATES_HZ
    if not low <= rate_hz <= high:
        raise AudioError(f"{path} has {rate_hz} samples per second, accepted are {low} to {high}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{path} has {channels} channels, accepted are 1 to {MAX_CHANNELS}")


def _read_mono(path: str | Path, file: Any, max_s: float) -> np.ndarray:
    """The samples of an open file at its own rate, mixed to mono."""
    most = max_s * file.samplerate
    blocks: list[np.ndarray] = []
    num_samples = 0
    while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        num_samples += len(block)
        if num_samples > most:
            raise AudioError(f"{path} is longer than {max_s:g} s")
        if not np.isfinite(block).all():
            raise AudioError(f"{path} holds samples that are not numbers")
        if np.abs(block).max() > MAX_LEVEL:
            raise AudioError(f"{path} holds samples beyond {MAX_LEVEL}, where full scale is 1")
        blocks.append(block.mean(axis=1))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
