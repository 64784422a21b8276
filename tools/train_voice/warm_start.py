"""Starts the vocoder from the SEANet decoder of an earlier voice of the same sizes.

The earlier decoder took an hour and a half to learn; only its input and its phase are of no use.
Its least important channels make room for the wires, and its first convolution, which read the
earlier codec's states, is fitted to the new states by ridge regression.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import MimiModel

from codec import (
    CONTENT_DIM,
    PULSE_BOOK,
    codebook_vectors,
    decoder_states,
    load_codec,
    parts,
    rvqs,
    waveform_latents,
)
from common import Speech
from pulse_codes import F0_HATS
from wires import COUNTS, carry_pulses

UTTERANCES = 80
UPSAMPLINGS = (2, 5, 8, 11)  # layers of the decoder; the residual block follows
RIDGE = 1e-2  # of the mean variance
VOICED_SHARE = 0.67  # a frame of which the regression is half sure that it is voiced is voiced
LEAK = 0.1  # of the weights that lead from a wire to the channels of the earlier decoder


def outputs(seanet, first):
    """The outputs of layers 0, 3, 6, 9 and 12, from that of the first convolution [B, C, T]."""
    found, hidden = [first], first
    for number, layer in enumerate(seanet.layers[1:], 1):
        hidden = layer(hidden)
        if number in (3, 6, 9, 12):
            found.append(hidden)
    return found


def consumer(seanet, stage: int):
    """The weight that reads the outputs of a stage, and its dimension of input channels."""
    layer = seanet.layers[(*UPSAMPLINGS, 14)[stage]].conv
    return layer.weight, 0 if stage < len(UPSAMPLINGS) else 1


@torch.no_grad()
def reorder(seanet, stage: int, order):
    """Permutes the channels of one stage; the decoder computes the same."""
    maker = seanet.layers[(0, *UPSAMPLINGS)[stage]].conv
    maker.weight.copy_(maker.weight[order] if stage == 0 else maker.weight[:, order])
    maker.bias.copy_(maker.bias[order])
    if stage > 0:
        _, narrow, _, wide = seanet.layers[UPSAMPLINGS[stage - 1] + 1].block
        narrow.conv.weight.copy_(narrow.conv.weight[:, order])
        wide.conv.weight.copy_(wide.conv.weight[order])
        wide.conv.bias.copy_(wide.conv.bias[order])
    weight, dim = consumer(seanet, stage)
    weight.copy_(weight.index_select(dim, order))


@torch.no_grad()
def make_room(seanet, first):
    """Moves the channels whose loss changes least to the front, where the wires will be. `first`
    [B, C, T] are outputs of the first convolution, which is permuted too: returns its order."""
    orders = []
    for stage, hidden in enumerate(outputs(seanet, first)):
        weight, dim = consumer(seanet, stage)
        size = weight.transpose(0, dim).flatten(1).norm(dim=1)
        orders.append((F.elu(hidden).std((0, 2)) * size).argsort())
    for stage, order in enumerate(orders):
        reorder(seanet, stage, order)
    return orders[0]


@torch.no_grad()
def add_wires(seanet):
    """Replaces the first channels of every stage by wires."""
    carry_pulses(seanet)
    for stage, count in enumerate(COUNTS):
        weight, dim = consumer(seanet, stage)
        kept = COUNTS[stage + 1] if stage + 1 < len(COUNTS) else 0
        reads = weight.transpose(0, dim)[:count]  # a view: [wires, outputs, ...]
        reads[:, kept:] *= LEAK
        if stage > 0:
            seanet.layers[UPSAMPLINGS[stage - 1] + 1].block[1].conv.weight[:, :count] *= LEAK


def ridge(inputs, targets):
    """inputs [N, D], targets [N, O] -> weights [D, O] and bias [O]."""
    mean, target_mean = inputs.mean(0), targets.mean(0)
    centred = inputs - mean
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, centred.T @ (targets - target_mean))
    return weights, target_mean - mean @ weights


@torch.no_grad()
def fit_pulses(codec: MimiModel, speech: Speech, indices):
    """Let an encoder that knows no pulse codes tell voicing and F0, by a linear regression of the
    pulse channels from its latents. It cannot tell the phase, which a context does not need: those
    channels are 0, and the others large enough to find the nearest code alone."""
    book = rvqs(codec)[1].layers[PULSE_BOOK - 1].codebook
    vectors = codebook_vectors(book)[:, CONTENT_DIM:].clone()
    vectors *= VOICED_SHARE * vectors[1:].square().sum(1).mean()
    vectors[:, : -F0_HATS - 2] = 0
    latents, targets = [], []
    for index in indices:
        audio = torch.from_numpy(speech.samples(int(index)))[None]
        latents.append(waveform_latents(codec, audio)[0].T)
        targets.append(vectors[speech.pulses(int(index))])
    inputs = torch.cat(latents)
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weights = torch.linalg.solve(gram, inputs.T @ torch.cat(targets))
    rvqs(codec)[1].input_proj.weight[CONTENT_DIM:] = weights.T[..., None]


class WarmStart:
    """The earlier decoder, ready for `Vocoder`, and the outputs that its first convolution had."""

    @torch.no_grad()
    def __init__(self, checkpoint, speech: Speech, rng):
        earlier = load_codec(checkpoint)
        self.seanet = parts(earlier).decoder_seanet
        self.indices = rng.choice(speech.train, UTTERANCES, replace=False)
        self.targets = []
        for index in self.indices:
            audio = torch.from_numpy(speech.samples(int(index)))[None, None]
            codes = earlier.encode(audio).audio_codes
            states = decoder_states(earlier, earlier.quantizer.decode(codes))
            self.targets.append(self.seanet.layers[0](states.transpose(1, 2)))
        order = make_room(self.seanet, torch.cat(self.targets[:20], 2))
        self.targets = [target[0, order].T for target in self.targets]
        add_wires(self.seanet)

    @torch.no_grad()
    def fit(self, vocoder, codec: MimiModel, codes, ends):
        """Fits the first convolution to the states of `codec` for `codes` [N, K], whose utterances
        end at `ends`. Returns the share of the outputs' variance that is explained."""
        first = vocoder.convs()[0]
        kernel = first.weight.shape[2]
        windows = []
        for index in self.indices:
            item = codes[ends[index - 1] if index else 0 : ends[index]].astype(np.int64)
            quantized = codec.quantizer.decode(torch.from_numpy(item).T[None])
            states = decoder_states(codec, quantized)[0]
            states = (states - vocoder.mean) @ vocoder.whitening
            states = F.pad(states, (0, 0, kernel - 1, 0))
            windows.append(states.unfold(0, kernel, 1).flatten(1))
        inputs = torch.cat(windows)
        targets = torch.cat([t[: len(w)] for t, w in zip(self.targets, windows, strict=True)])
        weights, bias = ridge(inputs, targets)
        error = (inputs @ weights + bias - targets).square().sum()
        kept = slice(COUNTS[0], None)
        weight = first.weight.clone()
        weight[kept] = weights.T.view(weight.shape)[kept]
        first.weight = weight
        first.bias[kept] = bias[kept]
        return 1 - float(error / (targets - targets.mean(0)).square().sum())
