"""Starts the language model from an earlier voice's, although codes and tokens differ.

The layers, which took two hours to learn, stay. Text embeddings go by phone: the words that both
pronouncing dictionaries spell give the correspondence. The earlier codec encodes some of the new
speech, so every frame has codes of both: the new codes' embeddings are fitted so that a frame's sum
is as it was, and a new code's row of the head is the mean of its frames' earlier rows.
"""

import collections
import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import CsmForConditionalGeneration

from common import FIRST_PHONE, Speech, wait_while_paused

UTTERANCES = 600
ROUNDS = 4  # of backfitting: a frame's embedding is a sum over codebooks
PRIOR_FRAMES = 4  # rare codes stay near the mean of all frames
PHONES = range(FIRST_PHONE, FIRST_PHONE + 0x400)
SERVED_TEMPERATURE, EXPORTED_TEMPERATURE = 0.9, 0.3  # export.py scaled both heads by their ratio


def spellings(tokenizer: dict) -> dict[str, str]:
    """The words of a tokenizer.json, with their private-use characters."""
    found = {}
    for rule in tokenizer["normalizer"]["normalizers"]:
        pattern = rule.get("pattern", {}).get("Regex", "")
        if word := re.fullmatch(r"(?:\(\?<!'\))?\\b([a-z']+)\\b", pattern):
            found[word[1]] = rule["content"]
    return found


def same_tokens(new: dict, earlier: dict) -> dict[int, int]:
    """Two tokenizer.json files -> {new id: earlier id} of all tokens that mean the same."""
    votes = collections.defaultdict(collections.Counter)
    before = spellings(earlier)
    for word, phones in spellings(new).items():
        if len(phones) == len(before.get(word, "")):
            for char, was in zip(phones, before[word], strict=True):
                votes[char][was] += 1
    chars = {char: counts.most_common(1)[0][0] for char, counts in votes.items()}
    vocab, known = new["model"]["vocab"], earlier["model"]["vocab"]
    found = {}
    for token, index in vocab.items():
        if len(token) == 1 and ord(token) in PHONES:
            token = chars.get(token)
        if token in known:
            found[index] = known[token]
    return found


def frame_means(codes, values, size: int):
    """codes [N], values [N, C] -> the mean of each code's values, shrunk to 0, [size, C]."""
    sums = torch.zeros(size, values.shape[1]).index_add_(0, codes, values)
    counts = torch.bincount(codes, minlength=size)[:, None]
    return sums / (counts + PRIOR_FRAMES)


def backfit(codes, values, size: int):
    """codes [N, K], values [N, C] -> tables [K, size, C]: the sum of the rows that a frame's codes
    look up is near its value."""
    mean = values.mean(0)
    count = codes.shape[1]
    tables = torch.zeros(count, size, values.shape[1])
    rest = values - mean
    for _ in range(ROUNDS):
        for k in range(count):
            rest = rest + tables[k][codes[:, k]]
            tables[k] = frame_means(codes[:, k], rest, size)
            rest = rest - tables[k][codes[:, k]]
    return tables + mean / count


@torch.no_grad()
def earlier_codes(codec, speech: Speech, indices):
    """Codes [N, K] of whole utterances, one after the other."""
    found = []
    for index in indices:
        wait_while_paused()
        audio = torch.from_numpy(speech.samples(int(index)))[None, None]
        found.append(codec.encode(audio).audio_codes[0].T)
    return torch.cat(found)


@torch.no_grad()
def transfer(model, checkpoint: Path, run: Path, speech: Speech, rng):
    """Fills `model` from the voice in `checkpoint`; its last heads stay random."""
    earlier = CsmForConditionalGeneration.from_pretrained(checkpoint).float().eval()
    saved = np.load(run / "codes.npz")
    ends = saved["ends"]
    usable = [i for i in speech.train if i < len(ends)]
    indices = rng.choice(usable, min(UTTERANCES, len(usable)), replace=False)
    spans = [slice(ends[i - 1] if i else 0, ends[i]) for i in indices]
    codes = torch.from_numpy(np.concatenate([saved["codes"][s] for s in spans]).astype(np.int64))
    before = earlier_codes(earlier.codec_model, speech, indices)
    assert len(before) == len(codes), (len(before), len(codes))

    other = earlier.state_dict()
    for name, tensor in model.state_dict().items():
        kept = other.get(name)
        alike = kept is not None and kept.shape == tensor.shape
        if alike and not name.startswith(("codec_model", "embed_text_tokens", "lm_head")):
            tensor.copy_(kept)
    tokens = same_tokens(
        *(json.loads((f / "tokenizer.json").read_text()) for f in (run, Path(checkpoint)))
    )
    new_ids, earlier_ids = (torch.tensor(x) for x in zip(*tokens.items(), strict=True))
    model.embed_text_tokens.weight[new_ids] = earlier.embed_text_tokens.weight[earlier_ids]

    size, count = model.config.vocab_size, model.config.num_codebooks
    table = earlier.backbone_model.embed_tokens.embed_audio_tokens.weight
    offsets = torch.arange(before.shape[1]) * earlier.config.vocab_size
    frames = table[before + offsets].sum(1)
    made = backfit(codes, frames, size)
    # The stop frame is all zeros. Only there has codebook 0 this code, which makes up for the rest.
    made[0, 0] = table[offsets].sum(0) - made[1:, 0].sum(0)
    model.backbone_model.embed_tokens.embed_audio_tokens.weight.copy_(made.flatten(0, 1))

    cooler = EXPORTED_TEMPERATURE / SERVED_TEMPERATURE
    head = earlier.lm_head.weight * cooler
    mean = head.mean(0)
    rows = frame_means(codes[:, 0], head[before[:, 0]] - mean, size) + mean
    rows[0] = head[0]
    model.lm_head.weight.copy_(rows)
    error = (sum(made[k][codes[:, k]] for k in range(count)) - frames).square().sum()
    explained = 1 - float(error / (frames - frames.mean(0)).square().sum())
    print(f"{len(tokens)} tokens kept; {explained:.0%} of the frames' embeddings explained")
