"""Starts the vocoder from the SEANet decoder of an earlier voice of the same sizes.

Its first convolution, which read the earlier codec's states, is fitted to the new states by ridge
regression on utterances in both voices' codes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import MimiModel

from codec import decoder_states

UTTERANCES = 80
RIDGE = 1e-2  # of the mean variance


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


def utterance(codes, ends, index: int):
    """Codes [T, K] of an utterance."""
    return torch.from_numpy(codes[ends[index - 1] if index else 0 : ends[index]].astype(np.int64))


@torch.no_grad()
def fit_first(vocoder, codec: MimiModel, earlier: MimiModel, pairs):
    """Fits the first convolution of `vocoder`, whose decoder is that of `earlier`, to the states of
    `codec`. `pairs` are codes [T, K] of both codecs of some utterances. Returns the share of the
    outputs' variance that is explained."""
    first = vocoder.convs()[0]
    kernel = first.weight.shape[2]
    windows, targets = [], []
    for new, before in pairs:
        states = (codec_states(codec, new) - vocoder.mean) @ vocoder.whitening
        windows.append(F.pad(states, (0, 0, kernel - 1, 0)).unfold(0, kernel, 1).flatten(1))
        targets.append(vocoder.seanet.layers[0](codec_states(earlier, before).T[None])[0].T)
    inputs, outputs = torch.cat(windows), torch.cat(targets)
    weights, bias = ridge(inputs, outputs)
    error = (inputs @ weights + bias - outputs).square().sum()
    first.weight = weights.T.view(first.weight.shape)
    first.bias.copy_(bias)
    return 1 - float(error / (outputs - outputs.mean(0)).square().sum())


def utterance_pairs(run, indices, rng):
    """Codes [T, K] of some utterances by RUN/codes.npz and by RUN/earlier_codes.npz."""
    both = [np.load(run / name) for name in ("codes.npz", "earlier_codes.npz")]
    streams = [(saved["codes"], saved["ends"]) for saved in both]
    indices = [i for i in indices if i < min(len(ends) for _, ends in streams)]
    chosen = rng.choice(indices, min(UTTERANCES, len(indices)), replace=False)
    return [[utterance(codes, ends, i) for codes, ends in streams] for i in chosen]
