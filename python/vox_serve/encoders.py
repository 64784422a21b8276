"""Encoders of all formats, as streams: samples in as they are made, bytes out at once.

    encoder = open_encoder(Output.of("opus"), note)
    for pcm in chunks:
        send(encoder.feed(pcm))
    send(encoder.close())

The bytes of one encoder are one file. An encoder has state and may be used by one thread at a time.
`open_shaper` changes tempo and sample rate before.
"""

from functools import cache
from typing import Protocol

import numpy as np

from vox_serve.audio import SAMPLE_RATE_HZ, pcm16, wav_header
from vox_serve.formats import Output
from vox_serve.provenance import info_chunk

SAMPLE_BYTES = 2


class Stage(Protocol):
    """A step of a stream. `feed` and `close` return the bytes that are ready, possibly none."""

    def feed(self, data: bytes) -> bytes: ...

    def close(self) -> bytes:
        """The rest. Nothing may be fed afterwards."""


def open_encoder(output: Output, note: str | None = None, num_samples: int | None = None) -> Stage:
    """An encoder of mono 16-bit little-endian PCM at the output's sample rate.

    Args:
        output: its format and rate. Its speed means nothing here: see `open_shaper`.
        note: goes into the metadata of formats that have any (see provenance.py); None for none.
        num_samples: samples that will be fed, which headers then declare; None while a stream's
            length is not known. A WAV has metadata only with it.

    Raises:
        ImportError: the format needs PyAV, and that cannot be loaded.
    """
    name = output.format.name
    if name == "wav":
        return _Wav(output.rate_hz, note, num_samples)
    if name == "pcm":
        return UNCHANGED
    if name == "ulaw":
        return _Ulaw()
    from vox_serve import codec_encoders

    return codec_encoders.ENCODERS[name](note, num_samples)


def open_shaper(output: Output) -> Stage | None:
    """A stage that gives PCM at 24 kHz an output's speed, watermark and sample rate, or None if it
    needs none of these.

    Raises:
        ImportError: a watermark or a speed other than 1 needs a package that cannot be loaded.
    """
    stages: list[Stage] = []
    if output.speed != 1.0:
        from vox_serve.tempo import Tempo

        stages.append(Tempo(output.speed))
    if output.watermark:  # after a change of tempo, which would change it too
        from vox_serve.watermark import Watermark

        stages.append(Watermark())
    if output.rate_hz != SAMPLE_RATE_HZ:
        stages.append(_Resampler(output.rate_hz))
    return Chain(*stages) if stages else None


def open_stream(output: Output, note: str | None = None) -> Stage:
    """A shaper, if there is need of one, and an encoder of a length that is not known yet."""
    shaper, encoder = open_shaper(output), open_encoder(output, note)
    return encoder if shaper is None else Chain(shaper, encoder)


def file_bytes(encoder: Stage, pcm_bytes: int) -> int:
    """Length of the file that an encoder of WAV or PCM makes of so many bytes; it is closed."""
    return pcm_bytes + len(encoder.feed(b"")) + len(encoder.close())


class Chain:
    """Stages, each of which takes what the one before it gives."""

    def __init__(self, *stages: Stage) -> None:
        self._stages = stages

    def feed(self, data: bytes) -> bytes:
        for stage in self._stages:
            data = stage.feed(data)
        return data

    def close(self) -> bytes:
        data = b""
        for stage in self._stages:
            data = stage.feed(data) + stage.close()
        return data


class _Unchanged:
    def feed(self, data: bytes) -> bytes:
        return data

    def close(self) -> bytes:
        return b""


UNCHANGED = _Unchanged()


class _Wav:
    def __init__(self, rate_hz: int, note: str | None, num_samples: int | None) -> None:
        num_bytes = None if num_samples is None else num_samples * SAMPLE_BYTES
        # After the samples: programs that take a header for 44 bytes find them where they look.
        # ffmpeg takes what follows no samples for samples.
        self._tail = info_chunk(note) if note is not None and num_bytes else b""
        self._head = wav_header(num_bytes, rate_hz, len(self._tail))

    def feed(self, data: bytes) -> bytes:
        head, self._head = self._head, b""
        return head + data

    def close(self) -> bytes:
        return self._head + self._tail


class _Ulaw:
    def feed(self, data: bytes) -> bytes:
        return _ulaw_codes()[np.frombuffer(data, "<u2")].tobytes()

    def close(self) -> bytes:
        return b""


@cache
def _ulaw_codes() -> np.ndarray:
    """G.711's mu-law code of each 16-bit sample, uint8 `[65536]`; a negative one is at 65536 + it.

    The code has the sign, the exponent and four bits of the magnitude, all inverted.
    """
    samples = np.arange(65536, dtype=np.uint16).view(np.int16).astype(np.int32)
    magnitude = np.minimum(np.abs(samples), 32635) + 132
    exponent = np.floor(np.log2(magnitude)).astype(np.int32) - 7
    mantissa = magnitude >> (exponent + 3) & 15
    codes = (samples < 0) << 7 | exponent << 4 | mantissa
    return (codes ^ 255).astype(np.uint8)


class _Resampler:
    """Changes the sample rate. The output is aligned with the input, without seams."""

    def __init__(self, rate_hz: int) -> None:
        import soxr

        # Not its 16-bit mode, which adds noise.
        self._stream = soxr.ResampleStream(SAMPLE_RATE_HZ, rate_hz, 1, dtype="float32")

    def feed(self, data: bytes) -> bytes:
        return self._resample(data, False)

    def close(self) -> bytes:
        return self._resample(b"", True)

    def _resample(self, data: bytes, last: bool) -> bytes:
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        return pcm16(self._stream.resample_chunk(samples, last=last)).tobytes()
