"""Channels of the SEANet decoder that carry the pulses' phase up to the sample rate."""

import itertools
import math

import torch

from pulse_codes import HALF_DIM, PULSE_DIM, fine_basis

WIRE_OFFSET = 1.25
BINS = (12, 12, 8)  # at 1200, 6000 and 24,000 Hz
BIN_GAIN, BIN_BIAS = 1.5, -0.75
# Channels that are wires or bins: after the first convolution, then at 200, 1200, 6000, 24,000 Hz.
COUNTS = (HALF_DIM + 1, 24, 4 + BINS[0], 2 + BINS[1], 2 + BINS[2])


def clear(weight):
    weight.mul_(1e-3)


def phase_bins(count: int):
    """Weights of (cosine, sine) and biases of the bins: high near one phase each, in the saturated
    half of ELU elsewhere. [count, 2], [count]; the biases take off the wires' offset."""
    angle = 2 * math.pi * torch.arange(count) / count
    weights = BIN_GAIN * torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    return weights, BIN_BIAS - WIRE_OFFSET * weights.sum(1)


def interpolate_wires(conv, bins: int, taps):
    """Channels 0 and 1 of the upsampling become wires, the next ones bins. `taps` holds, per output
    step, (input channel of the cosine, kernel tap, weight); a step's weights sum to 1."""
    clear(conv.weight[:, : 2 + bins])
    weights, biases = phase_bins(bins)
    for channel, tap, weight in itertools.chain.from_iterable(taps):
        for part in (0, 1):
            conv.weight[channel + part, part, tap] = weight
            conv.weight[channel + part, 2 : 2 + bins, tap] = weight * weights[:, part]
    conv.bias[:2] = 0
    conv.bias[2 : 2 + bins] = biases


@torch.no_grad()
def carry_pulses(seanet):
    """Let some channels of the SEANet decoder start as wires: the pulses' cosine and sine, at 1200,
    6000 and 24,000 Hz, and bins that each cover some phases. 275 steps from a random start do not
    find them; without the two higher rates and the bins, 170 steps at batches of 3 do not either.

    An offset keeps a wire in the linear half of ELU.
    """
    first, wide, narrow, six_khz, full = (seanet.layers[i].conv for i in (0, 2, 5, 8, 11))
    strides = [conv.stride[0] for conv in (wide, narrow, six_khz, full)]
    assert strides == [8, 6, 5, 4], strides
    wires = HALF_DIM
    states = first.weight.shape[1] - PULSE_DIM
    clear(first.weight[: wires + 1])
    for half in (0, HALF_DIM):
        rows = torch.arange(HALF_DIM)
        first.weight[rows, states + half + rows, -1] = 1.0
    first.bias[: wires + 1] = WIRE_OFFSET  # channel `wires` is constant
    # 200 Hz: cosine and sine of the 12 points of 5 ms.
    basis = torch.from_numpy(fine_basis()).view(HALF_DIM, 8, 24).transpose(1, 2)
    clear(wide.weight[:, :24])
    wide.weight[:wires, :24, :8] = basis
    wide.weight[wires, :24, :8] = -basis.sum(0)
    wide.bias[:24] = WIRE_OFFSET
    # 1200 Hz: cosine and sine of two points, then the bins of the middle between them.
    bins, biases = phase_bins(BINS[0])
    clear(narrow.weight[:, : 4 + BINS[0]])
    for step in range(6):
        for wire in range(4):
            narrow.weight[4 * step + wire, wire, step] = 1.0
            narrow.weight[4 * step + wire, 4 : 4 + BINS[0], step] = bins[:, wire % 2] / 2
    narrow.bias[:4] = 0
    narrow.bias[4 : 4 + BINS[0]] = biases
    # Output step n of 5 is centred on sample 4 n + 2, the points on samples 5 and 15.
    between = [(4 * n - 3) / 10 for n in range(5)]
    taps = [((0, n, 1 - late), (2, n, late)) for n, late in enumerate(between)]
    interpolate_wires(six_khz, BINS[1], taps)
    # Output step n of 4 lies (n + 2.5) / 4 of the way from the previous input to this one.
    taps = [((0, n, (n + 2.5) / 4), (0, n + 4, (1.5 - n) / 4)) for n in range(4)]
    interpolate_wires(full, BINS[2], taps)
    for layer, count in zip((3, 6, 9, 12), COUNTS[1:], strict=True):
        last = seanet.layers[layer].block[-1].conv
        clear(last.weight[:count])
        clear(last.bias[:count])
