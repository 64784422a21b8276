"""Starts the vocoder from the SEANet decoder of an earlier voice of the same sizes.

Its first convolution, which read the earlier codec's states, is fitted to the new states by ridge
regression. If the earlier voice had no pulse codes, the least important channels of its decoder
make room for the wires.
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
VOICED_SHARE = 0.67  # of the pulse vectors' squared length: half voiced is then nearest to voiced
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


def codec_states(codec: MimiModel, codes):
    """Codes [N, K] -> what the SEANet decoder reads, [2N, C]."""
    return decoder_states(codec, codec.quantizer.decode(codes.T[None]))[0]


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
    """The earlier decoder, ready for `Vocoder`, and what its first convolution makes of some
    utterances: codes [N, K] in all, each up to its frame in `ends`."""

    @torch.no_grad()
    def __init__(self, checkpoint, codes, ends, indices, rng):
        earlier = load_codec(checkpoint)
        self.seanet = parts(earlier).decoder_seanet
        chosen = rng.choice(indices, min(UTTERANCES, len(indices)), replace=False)
        spans = [slice(ends[i - 1] if i else 0, ends[i]) for i in chosen]
        self.codes = [torch.from_numpy(codes[span].astype(np.int64)) for span in spans]
        books = list(range(codes.shape[1]))
        self.fitted = slice(None)
        knows_pulses = earlier.config.codebook_dim > CONTENT_DIM
        if not knows_pulses:
            books.remove(PULSE_BOOK)
        self.targets = [
            self.seanet.layers[0](codec_states(earlier, item[:, books]).T[None])
            for item in self.codes
        ]
        if not knows_pulses:
            order = make_room(self.seanet, torch.cat(self.targets[:20], 2))
            self.targets = [target[:, order] for target in self.targets]
            add_wires(self.seanet)
            self.fitted = slice(COUNTS[0], None)

    @torch.no_grad()
    def fit(self, vocoder, codec: MimiModel):
        """Fits the first convolution to the states of `codec`. Returns the share of the outputs'
        variance that is explained."""
        first = vocoder.convs()[0]
        kernel = first.weight.shape[2]
        windows = []
        for item in self.codes:
            states = (codec_states(codec, item) - vocoder.mean) @ vocoder.whitening
            states = F.pad(states, (0, 0, kernel - 1, 0))
            windows.append(states.unfold(0, kernel, 1).flatten(1))
        inputs, targets = torch.cat(windows), torch.cat([t[0].T for t in self.targets])
        weights, bias = ridge(inputs, targets)
        error = (inputs @ weights + bias - targets).square().sum()
        weight = first.weight.clone()
        weight[self.fitted] = weights.T.view(weight.shape)[self.fitted]
        first.weight = weight
        first.bias[self.fitted] = bias[self.fitted]
        return 1 - float(error / (targets - targets.mean(0)).square().sum())
