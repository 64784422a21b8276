"""Adds an inaudible watermark to speech, as it is made.

    mark = Watermark()
    for pcm in chunks:
        send(mark.feed(pcm))
    send(mark.close())

The network (see watermark_net.py) says how to change the levels of the spectrum below 2 kHz. Every
10 ms the change is made in a window of 64 ms, and windows overlap. A sample is complete with the
last window that has it, so the output is 54 ms later than the input.

Perth's own network looks 150 ms further ahead. Here each layer takes the present for what follows:
the weights of later hops are added to that of the present one. The changes are nearly the same.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vox_serve.watermark_net import (
    HOP,
    LEVEL_DB,
    NUM_BINS,
    SLOPE,
    WINDOW,
    levels,
    load_weights,
    spectra,
    window,
)

NUM_HOPS = 8
"""Hops that are computed together: those of a frame of speech. Always as many, so that the same
samples get the same mark in whatever pieces they come."""

BLOCK = NUM_HOPS * HOP

DELAY_SAMPLES = WINDOW - HOP

PAST = 3
"""Hops before the present one that each inner layer sees."""

SILENT_BLOCKS = 3
"""After so many blocks of silence the layers' inputs no longer change."""


class Watermark:
    """A stage (see encoders.py) from 16-bit PCM at 24 kHz to the same with a watermark.

    Raises:
        WatermarkMissing: see `load_weights`.
    """

    def __init__(self) -> None:
        self._network = _network()
        self._caches = list(self._network.silence)
        self._num_samples = 0
        self._num_before = DELAY_SAMPLES  # marks of the silence before the first sample
        self._plain = np.zeros(0, np.float32)  # samples whose marks are not complete
        self._next = np.zeros(0, np.float32)  # samples that make no whole block
        self._past = torch.zeros(DELAY_SAMPLES)  # samples with which the next windows begin
        self._overlap = torch.zeros(DELAY_SAMPLES)  # marks that are not complete

    def feed(self, data: bytes) -> bytes:
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        self._num_samples += len(samples)
        self._plain = np.concatenate([self._plain, samples])
        return self._advance(samples)

    def close(self) -> bytes:
        num_samples = self._num_samples + DELAY_SAMPLES
        num_zeros = DELAY_SAMPLES + -num_samples % BLOCK
        return self._advance(np.zeros(num_zeros, np.float32))

    def _advance(self, samples: np.ndarray) -> bytes:
        """The marked samples that are complete with some more."""
        blocks = np.concatenate([self._next, samples])
        num_blocks = len(blocks) // BLOCK
        self._next = blocks[num_blocks * BLOCK :]
        marks = np.zeros(num_blocks * BLOCK, np.float32)
        for start in range(0, len(marks), BLOCK):
            block = torch.from_numpy(blocks[start : start + BLOCK])
            marks[start : start + BLOCK] = self._marks(block).numpy()
        num_before = min(self._num_before, len(marks))
        self._num_before -= num_before
        marks = marks[num_before:][: len(self._plain)]
        marked = self._plain[: len(marks)] + marks
        self._plain = self._plain[len(marks) :]
        return np.clip(np.rint(marked * 32768), -32768, 32767).astype("<i2").tobytes()

    @torch.inference_mode()
    def _marks(self, samples: Tensor) -> Tensor:
        """The marks that are complete with the next block; both `[BLOCK]`."""
        samples = torch.cat([self._past, samples])
        self._past = samples[BLOCK:]
        spectrum = spectra(samples)[:, :NUM_BINS]
        changes = self._network.run(levels(spectrum), self._caches)
        spectrum = spectrum * (10 ** (changes * (LEVEL_DB / 20)) - 1)
        waves = torch.fft.irfft(spectrum, WINDOW) * window()
        sums = functional.fold(
            waves.T[None], (1, DELAY_SAMPLES + BLOCK), (1, WINDOW), stride=(1, HOP)
        ).flatten()
        sums[:DELAY_SAMPLES] += self._overlap
        self._overlap = sums[BLOCK:]
        return sums[:BLOCK] / _envelope()


class _Network:
    """Perth's encoder as matrices.

    Attributes:
        silence: the caches after a long silence.
    """

    def __init__(self) -> None:
        self._layers = [(_matrix(weight), bias) for weight, bias in load_weights().encoder]
        hidden = self._layers[0][1].shape[0]
        self.silence = [torch.zeros(PAST, hidden) for _ in self._layers[1:-1]]
        with torch.inference_mode():
            for _ in range(SILENT_BLOCKS):
                self.run(torch.zeros(NUM_HOPS, NUM_BINS), self.silence)

    def run(self, x: Tensor, caches: list[Tensor]) -> Tensor:
        """The changes of some levels, both `[N, NUM_BINS]`.

        Args:
            x: the levels.
            caches: `[PAST, C]` each, the last inputs of the inner layers; they are replaced.
        """
        for i, (matrix, bias) in enumerate(self._layers):
            if 0 < i < len(self._layers) - 1:
                x = torch.cat([caches[i - 1], x])
                caches[i - 1] = x[-PAST:]
                num_hops, width = len(x) - PAST, x.shape[1]
                x = x.as_strided((num_hops, (PAST + 1) * width), (width, 1))  # hops side by side
            x = torch.addmm(bias, x, matrix)
            if i < len(self._layers) - 1:
                x = functional.leaky_relu(x, SLOPE)
        return x


def _matrix(weight: Tensor) -> Tensor:
    """A convolution `[O, I, K]` as a matrix `[hops * I, O]` for the hops up to the present one."""
    taps = weight.unbind(2)
    present = sum(taps[len(taps) // 2 :], torch.zeros(()))
    return torch.cat([tap.T for tap in (*taps[: len(taps) // 2], present)]).contiguous()


@cache
def _network() -> _Network:
    return _Network()


@cache
def _envelope() -> Tensor:
    """The sum of the squares of all windows that have a sample, `[BLOCK]`."""
    squares = functional.pad(window() ** 2, (0, -WINDOW % HOP))
    return squares.reshape(-1, HOP).sum(0).repeat(NUM_HOPS)
