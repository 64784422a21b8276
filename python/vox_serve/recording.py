"""Decodes recordings of unknown origin, from files or bytes, within bounds.

libsndfile decodes. What its header says is checked first, then blocks are decoded one at a time, so
memory follows the seconds that are accepted, whatever the header says and however well the data
is compressed.
"""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vox_serve.audio import SAMPLE_RATE_HZ

MAX_SAMPLES = 2**27
"""Most samples of a recording, before and after resampling: 512 MiB, or 46 minutes at 48 kHz."""
MAX_LEVEL = 65_536
"""Largest sample that is read: full scale is 1, but some tools write 16-bit values as floats."""
UNKNOWN_FRAMES = 2**62
"""libsndfile gives at least this length to a FLAC stream that does not state its own."""
CANCELLED_POWER = 0.25
"""Channels cancel if their sum has less than this share of the power of uncorrelated channels."""
SILENT_CHANNEL_POWER = 1e-5
"""A channel 50 dB below the loudest is silent, and the average leaves it out."""
_BLOCK_SAMPLES = 1 << 16  # read at a time: 16 MiB with all channels

_MAGIC = {
    "WAV": (b"RIFF", b"RIFX", b"RF64", b"FORM"),
    "FLAC": (b"fLaC",),
    "OGG": (b"OggS",),
    "MP3": (b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"\xff\xe3", b"\xff\xe2"),
}


class AudioError(ValueError):
    """A recording is unreadable or out of bounds; the message names it and the reason."""


class AudioTooLargeError(AudioError):
    """A recording has more bytes than its limit."""


@dataclass(frozen=True)
class Limits:
    """Bounds on a recording.

    Attributes:
        max_s: longest duration, before silence is trimmed; `MAX_SAMPLES` holds too.
        max_bytes: most bytes of the encoded recording.
        rates_hz: lowest and highest sample rate; the resampler's filters grow with the ratio.
        max_channels: most channels.
        common_only: accept WAV, AIFF, FLAC, OGG and MP3 only, not everything that libsndfile
            decodes. For bytes from the network.
    """

    max_s: float = math.inf
    max_bytes: float = math.inf
    rates_hz: tuple[int, int] = (1_000, 384_000)
    max_channels: int = 64
    common_only: bool = False


@dataclass(frozen=True)
class Recording:
    """Decoded audio.

    Attributes:
        samples: `[S]` float32, mono; full scale is 1, but louder ones occur.
        sample_rate_hz: their rate.
        name: of the file, or "the recording", for messages.
    """

    samples: np.ndarray
    sample_rate_hz: int
    name: str = "the recording"

    def at_rate(self, sample_rate_hz: int) -> np.ndarray:
        """The samples, resampled by soxr if the rate is another.

        Raises:
            AudioError: none are left: a few samples at a high rate are none at a lower one.
        """
        import soxr

        samples = self.samples
        if len(samples) and self.sample_rate_hz != sample_rate_hz:
            samples = soxr.resample(samples, self.sample_rate_hz, sample_rate_hz)
        if not len(samples):
            raise AudioError(f"{self.name} holds no samples")
        return np.ascontiguousarray(samples, dtype=np.float32)


def read_audio(
    source: bytes | str | Path, sample_rate_hz: int = SAMPLE_RATE_HZ, max_s: float = math.inf
) -> np.ndarray:
    """Decode a recording and resample it, and change nothing else.

    Args:
        source: the encoded bytes, or a file in any format that libsndfile decodes.
        sample_rate_hz: sample rate of the result.
        max_s: longest recording that is accepted.

    Returns:
        `[S]` float32, contiguous.

    Raises:
        FileNotFoundError, AudioError: see `decode`.
    """
    limits = Limits(max_s=min(max_s, MAX_SAMPLES / sample_rate_hz))
    return decode(source, limits).at_rate(sample_rate_hz)


def decode(source: bytes | str | Path, limits: Limits = Limits()) -> Recording:
    """Decode a recording and mix it to mono.

    Mono is the average of the channels that are not silent. If the channels cancel each other,
    as a microphone wired in anti-phase makes them do, it is the loudest channel.

    Args:
        source: the encoded bytes, or a file in any format that libsndfile decodes.
        limits: the bounds.

    Raises:
        FileNotFoundError: there is no such file.
        AudioError: there is no readable audio, or a bound is exceeded, or a sample is not finite
            or beyond `MAX_LEVEL`.
        AudioTooLargeError: it has more than `limits.max_bytes`.
    """
    name = "the recording" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"no such audio file: {source}")
    num_bytes = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if num_bytes > limits.max_bytes:
        raise AudioTooLargeError(
            f"{name} has {num_bytes} bytes, accepted are at most {limits.max_bytes}"
        )
    if limits.common_only:
        _check_common(source, name)
    with _opened(source, name) as file:
        _check_header(name, file, limits)
        rate_hz, channels = file.samplerate, file.channels
        powers, mean_power, blocks = np.zeros(channels), 0.0, []
        for block in _blocks(name, file, limits.max_s):
            mean = block.mean(axis=1)
            powers += np.einsum("nc,nc->c", block, block, dtype=np.float64)
            mean_power += float(np.einsum("n,n->", mean, mean, dtype=np.float64))
            blocks.append(mean)
    chosen = _channels(powers, mean_power)
    if len(chosen) < channels:  # rare, so the channels are not kept for it
        with _opened(source, name) as file:
            blocks = [b[:, chosen].mean(axis=1) for b in _blocks(name, file, limits.max_s)]
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return Recording(samples, rate_hz, name)


def _channels(powers: np.ndarray, mean_power: float) -> np.ndarray:
    """Indices of the channels to average, from each channel's power and that of their average."""
    loudest = powers.max()
    heard = np.flatnonzero(powers >= SILENT_CHANNEL_POWER * loudest)
    uncorrelated = powers.sum() / len(powers) ** 2
    if len(heard) > 1 and mean_power < CANCELLED_POWER * uncorrelated:
        # The first of about equals: rounding must not choose the polarity.
        return np.flatnonzero(powers >= 0.8 * loudest)[:1]
    return heard


@contextmanager
def _opened(source: bytes | str | Path, name: str) -> Iterator[Any]:
    """The recording as an open SoundFile, whose errors become AudioErrors."""
    import soundfile

    try:
        with soundfile.SoundFile(
            io.BytesIO(source) if isinstance(source, bytes) else source
        ) as file:
            yield file
    except (
        soundfile.LibsndfileError,
        TypeError,
        OverflowError,
    ) as error:  # TypeError: a headerless format, by the file's name
        reason = getattr(error, "error_string", error)
        raise AudioError(f"cannot read audio from {name}: {reason}") from None


def _check_common(source: bytes | str | Path, name: str) -> None:
    if isinstance(source, bytes):
        head = source[:4]
    else:
        with open(source, "rb") as file:
            head = file.read(4)
    if not head.startswith(tuple(magic for all_of in _MAGIC.values() for magic in all_of)):
        raise AudioError(f"{name} is neither WAV, AIFF, FLAC, OGG nor MP3")


def _check_header(name: str, file: Any, limits: Limits) -> None:
    low, high = limits.rates_hz
    if not low <= file.samplerate <= high:
        raise AudioError(
            f"{name} has {file.samplerate} samples per second, accepted are {low} to {high}"
        )
    if not 1 <= file.channels <= limits.max_channels:
        raise AudioError(
            f"{name} has {file.channels} channels, accepted are 1 to {limits.max_channels}"
        )
    duration_s, max_s = file.frames / file.samplerate, _longest_s(file, limits.max_s)
    if duration_s > max_s and file.frames < UNKNOWN_FRAMES:
        raise AudioError(f"{name} is {_seconds(duration_s)} long; at most {max_s:g} s fit")


def _blocks(name: str, file: Any, max_s: float) -> Iterator[np.ndarray]:
    """The samples of an open file, `[N, C]` at a time; the header's length is not believed."""
    max_s = _longest_s(file, max_s)
    num_samples = 0
    while len(block := file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
        num_samples += len(block)
        if num_samples > max_s * file.samplerate:
            raise AudioError(f"{name} is longer than {max_s:g} s")
        if not np.isfinite(block).all():
            raise AudioError(f"{name} holds samples that are not numbers")
        if np.abs(block).max() > MAX_LEVEL:
            raise AudioError(f"{name} holds samples beyond {MAX_LEVEL}, where full scale is 1")
        yield block


def _longest_s(file: Any, max_s: float) -> float:
    return min(max_s, MAX_SAMPLES / max(file.samplerate, SAMPLE_RATE_HZ))


def _seconds(duration_s: float) -> str:
    return f"{duration_s * 1000:.0f} ms" if duration_s < 1 else f"{duration_s:.6g} s"
