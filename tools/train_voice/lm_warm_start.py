"""Starts the language model from an earlier voice's.

The layers stay. Text embeddings go by phone: the words that both pronouncing dictionaries spell
give the correspondence. The codes are new, but RUN/earlier_codes.npz has the same speech in the
earlier ones, which translates them (`translate`): embeddings by least squares, so that a frame's
sum of embeddings stays what it was, and heads by the mean of the earlier codes' rows.
"""

import collections
import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import CsmForConditionalGeneration

from common import FIRST_PHONE

PHONES = range(FIRST_PHONE, FIRST_PHONE + 0x400)
RIDGE = 10.0  # frames: a code that is rarer than this gets a small embedding
SERVED_TEMPERATURE, EXPORTED_TEMPERATURE = 0.9, 0.1  # export.py scales both heads by their ratio


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


def shared_frames(new: Path, earlier: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Two codes.npz of the same speech, of which one may have more -> codes [N, K] of both."""
    saved = [np.load(file) for file in (new, earlier)]
    first, second = (item["ends"] for item in saved)
    count = min(len(first), len(second))
    if (first[:count] != second[:count]).any():
        raise ValueError(f"{earlier} is not of the same speech as {new}")
    frames = first[count - 1]
    return tuple(torch.from_numpy(item["codes"][:frames].astype(np.int64)) for item in saved)


def pair_counts(first, second, size: int):
    """[size, size]: how often code i of `first` [N] meets code j of `second` [N]."""
    return torch.bincount(first * size + second, minlength=size * size).view(size, size).float()


def translate_table(new, targets, size: int):
    """The table [K, size, C] whose rows, summed over a frame's codes `new` [N, K], come closest to
    `targets` [N, C]."""
    count = new.shape[1]
    normal = torch.zeros(count, size, count, size)
    sums = torch.zeros(count, size, targets.shape[1])
    for i in range(count):
        sums[i].index_add_(0, new[:, i], targets)
        for j in range(count):
            normal[i, :, j] = pair_counts(new[:, i], new[:, j], size)
    normal = normal.view(count * size, -1)
    normal.diagonal().add_(RIDGE)
    return torch.linalg.solve(normal, sums.flatten(0, 1)).view(count, size, -1)


def translate_head(new, earlier, rows):
    """rows [size, D] of the earlier codes -> those of the new ones, by how often they meet."""
    share = pair_counts(new, earlier, len(rows))
    return share @ rows / share.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def translate(model, earlier, new, before):
    """Embeddings and heads of `model` for the codes `new` [N, K], from those of `earlier` for the
    codes `before` [N, K'] of the same frames."""
    size = model.config.vocab_size
    known = earlier.backbone_model.embed_tokens.embed_audio_tokens.weight.unflatten(0, (-1, size))
    targets = sum(known[k][before[:, k]] for k in range(before.shape[1]))
    table = translate_table(new, targets, size)
    table[0, 0] = known[:, 0].sum(0) - table[1:, 0].sum(0)  # the stop frame
    model.backbone_model.embed_tokens.embed_audio_tokens.weight.copy_(table.flatten(0, 1))
    made = sum(table[k][new[:, k]] for k in range(new.shape[1]))
    lost = (made - targets).square().mean() / targets.var(0).mean()
    print(f"translated embeddings explain {1 - lost:.0%} of the earlier ones")

    head = translate_head(new[:, 0], before[:, 0], earlier.lm_head.weight)
    head[0] = earlier.lm_head.weight[0]
    model.lm_head.weight.copy_(head)
    heads, rows = (m.depth_decoder.codebooks_head.weight for m in (model, earlier))
    for k in range(1, min(new.shape[1], before.shape[1])):
        heads[k - 1] = translate_head(new[:, k], before[:, k], rows[k - 1].T).T


@torch.no_grad()
def transfer(model, checkpoint: Path, run: Path):
    """Fills `model` from the voice in `checkpoint`."""
    earlier = CsmForConditionalGeneration.from_pretrained(checkpoint).float().eval()
    other = earlier.state_dict()
    for name, tensor in model.state_dict().items():
        kept = other.get(name)
        alike = kept is not None and kept.shape == tensor.shape
        if alike and not name.startswith(("codec_model", "embed_text_tokens")):
            tensor.copy_(kept)
    tokens = same_tokens(
        *(json.loads((f / "tokenizer.json").read_text()) for f in (run, Path(checkpoint)))
    )
    new_ids, earlier_ids = (torch.tensor(x) for x in zip(*tokens.items(), strict=True))
    model.embed_text_tokens.weight[new_ids] = earlier.embed_text_tokens.weight[earlier_ids]
    translate(model, earlier, *shared_frames(run / "codes.npz", run / "earlier_codes.npz"))
    cooler = EXPORTED_TEMPERATURE / SERVED_TEMPERATURE
    model.depth_decoder.codebooks_head.weight.mul_(cooler)
    model.lm_head.weight.mul_(cooler)
    print(f"{len(tokens)} of {model.config.text_vocab_size} tokens kept")
