"""The network of Resemble AI's Perth watermark, on spectra of 24 kHz.

The package `resemble-perth` (MIT) has the weights in its wheel. It is not imported, since its own
code needs librosa and torchaudio: only its file of weights is read. Its encoder takes the
magnitudes below 2 kHz of a spectrum every 10 ms and gives changes of their level, its decoder
says from such magnitudes whether they were changed. Perth works at 32 kHz with windows of 2,048
samples; windows of 1,536 at 24 kHz have the same bins.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.nn import functional

from vox_serve.cli import CommandError

WINDOW = 1536
HOP = 240
"""Samples of a window, and from one to the next, at 24 kHz: 64 and 10 ms."""

NUM_BINS = 128
"""Bins that the network sees and changes: 0 to 2 kHz."""

LEVEL_DB = 195.0
FLOOR_DB = -180.0
"""A level of 0 is `FLOOR_DB`, one of 1 is `LEVEL_DB` above it."""

SCALE = 2048 / WINDOW
"""Perth's longer windows have larger magnitudes."""

SLOPE = 0.01
"""Leaky ReLU's."""

RATES = (("slow", 1.25), ("normal", 1.0), ("fast", 0.75))
"""Perth's decoder looks at the spectra as they are, and stretched and compressed."""

MASK_SHARE = 0.05
"""Spectra below this share of the largest sum of levels are silent."""

Layer = tuple[Tensor, Tensor]
"""Weight `[O, I, K]` and bias `[O]` of a convolution, float32."""


class WatermarkMissing(ImportError):  # noqa: N818
    """The package with the watermark's network is not installed, or has another network."""


@dataclass(frozen=True)
class PerthWeights:
    """The network's convolutions.

    Attributes:
        encoder: seven layers, `NUM_BINS` in and out.
        decoders: by name of `RATES`, seven layers with two outputs: a weight and a verdict.
    """

    encoder: list[Layer]
    decoders: dict[str, list[Layer]]


@cache
def load_weights() -> PerthWeights:
    """Read the weights from the installed package.

    Raises:
        WatermarkMissing: there are none that fit.
    """
    spec = importlib.util.find_spec("perth")
    if spec is None or spec.origin is None:
        raise WatermarkMissing("a watermark needs the package resemble-perth")
    folder = Path(spec.origin).parent / "perth_net" / "pretrained" / "implicit"
    files = sorted(folder.glob("perth_net_*.pth.tar"))
    if not files:
        raise WatermarkMissing("the package resemble-perth has no weights")
    try:
        state = torch.load(files[-1], map_location="cpu", weights_only=True, mmap=True)["model"]
        weights = PerthWeights(
            _layers(state, "encoder.layers"),
            {name: _layers(state, f"decoder.{name}_layers") for name, _ in RATES},
        )
    except (OSError, RuntimeError, KeyError, ValueError, UnpicklingError) as error:
        raise WatermarkMissing(f"the weights of resemble-perth do not fit: {error}") from None
    return weights


def _layers(state: dict[str, Tensor], prefix: str) -> list[Layer]:
    layers = [
        (
            state[f"{prefix}.{i}.conv.weight"].float().clone(),
            state[f"{prefix}.{i}.conv.bias"].float().clone(),
        )
        for i in range(7)
    ]
    widths = {weight.shape[2] for weight, _ in layers[1:-1]}
    if layers[0][0].shape[1:] != (NUM_BINS, 1) or widths != {7}:
        raise ValueError("unknown shapes")
    return layers


def check_installed() -> None:
    """Load the network, so that a missing one is noticed early.

    Raises:
        CommandError: see `load_weights`.
    """
    try:
        load_weights()
    except WatermarkMissing as error:
        raise CommandError(f"--watermark: {error} (pip install --no-deps resemble-perth)") from None


@cache
def window() -> Tensor:
    """Hann's window, float32 `[WINDOW]`."""
    return torch.hann_window(WINDOW)


def spectra(samples: Tensor) -> Tensor:
    """Spectra of windows that end after each whole hop, complex64 `[N, WINDOW // 2 + 1]`.

    Args:
        samples: float32 `[WINDOW - HOP + N * HOP]`.
    """
    return torch.fft.rfft(samples.unfold(0, WINDOW, HOP) * window())


def levels(spectrum: Tensor) -> Tensor:
    """Levels as the network takes them, mostly 0 to 1."""
    floor = 10 ** (FLOOR_DB / 20)
    decibels = 20 * torch.log10((spectrum.abs() * SCALE).clamp_min(floor))
    return (decibels - FLOOR_DB) / LEVEL_DB


@torch.inference_mode()
def score(samples: Tensor) -> float:
    """The decoder's certainty that samples have the watermark, 0 to 1, by Perth's own rule.

    Args:
        samples: float32 at 24 kHz, in -1 to 1.
    """
    weights = load_weights()
    padded = functional.pad(samples, (WINDOW // 2, WINDOW // 2 + HOP))
    level = levels(spectra(padded)).T[None]  # [1, bins, N]
    sums = level.sum(1)
    mask = (sums > MASK_SHARE * sums.max()).float()[:, None]
    verdicts, sureness = [], []
    for name, rate in RATES:
        bins, here = level[:, :NUM_BINS], mask
        if rate != 1:
            size = max(int(bins.shape[2] * rate), 1)
            bins = functional.interpolate(bins, size=size, mode="linear", align_corners=True)
            here = functional.interpolate(mask, size=size, mode="nearest")
        out = _run(weights.decoders[name], bins)
        mean = (out * here).sum(2) / here.sum(2).clamp_min(1)
        sureness.append(mean[:, 0])
        verdicts.append(mean[:, 1])
    share = torch.softmax(torch.stack(sureness), 0)
    return float((share * torch.stack(verdicts)).sum().clamp(0, 1))


def _run(layers: list[Layer], x: Tensor) -> Tensor:
    """The layers on `[1, C, N]`, with zeros at both ends."""
    for i, (weight, bias) in enumerate(layers):
        x = functional.conv1d(x, weight, bias, padding=weight.shape[2] // 2)
        if i < len(layers) - 1:
            x = functional.leaky_relu(x, SLOPE)
    return x
