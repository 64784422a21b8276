"""Decodes what the encoders made, with PyAV and libsndfile, and compares it with the samples."""

import io
from typing import NamedTuple

import av
import numpy as np
import soundfile

RATE_HZ = 24_000


class Decoded(NamedTuple):
    """An audio file's content.

    Attributes:
        samples: float32 `[S]`, full scale 1.
        rate_hz: their rate.
        metadata: the container's and the stream's, with names in capitals.
    """

    samples: np.ndarray
    rate_hz: int
    metadata: dict[str, str]


def speech_like(num_samples: int, quiet: bool = True) -> np.ndarray:
    """Int16 `[S]`: syllables of a gliding voice; a quiet one begins and ends with silence."""
    t = np.arange(num_samples) / RATE_HZ
    phase = 2 * np.pi * (120 * t + 30 * np.sin(2 * np.pi * 0.7 * t))
    voice = sum(np.sin(k * phase) / k for k in range(1, 20))
    audio = voice * (0.55 + 0.45 * np.cos(2 * np.pi * 3 * t)) * 0.2
    if quiet:
        audio[:1920] = audio[-2304:] = 0
    return (audio * 32767).astype("<i2")


def with_av(content: bytes) -> Decoded:
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.audio[0]
        frames = [frame.to_ndarray() for frame in container.decode(stream)]
        metadata = {**container.metadata, **stream.metadata}
        named = {name.upper(): value for name, value in metadata.items()}
        samples = np.concatenate([np.zeros(0), *(frame.reshape(-1) for frame in frames)])
        if frames and frames[0].dtype.kind == "i":
            samples = samples / -float(np.iinfo(frames[0].dtype).min)
        return Decoded(samples.astype(np.float32), stream.rate, named)


def with_soundfile(content: bytes) -> Decoded:
    """libsndfile cannot read a FLAC of undeclared length."""
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        return Decoded(file.read(dtype="float32"), file.samplerate, file.copy_metadata())


def delay_of(decoded: np.ndarray, pcm: np.ndarray, most: int = 1200) -> tuple[int, float]:
    """The shift at which decoded samples agree best with the original, and their correlation.

    Args:
        decoded: float `[S]` at 24 kHz.
        pcm: int16 `[T]`, the original.
        most: largest shift.
    """
    middle = slice(len(pcm) // 4, len(pcm) * 3 // 4)
    original = pcm[middle].astype(np.float64)
    window = decoded[middle.start - most : middle.stop + most].astype(np.float64)
    products = np.correlate(window, original, "valid")
    shift = int(np.argmax(products)) - most
    shifted = decoded[middle.start + shift : middle.stop + shift]
    return shift, float(np.corrcoef(original, shifted)[0, 1])
