"""Starts the language model from an earlier voice's, whose codes the codec has kept.

The layers and all that belongs to a code stay. Text embeddings go by phone: the words that both
pronouncing dictionaries spell give the correspondence. Only the pulse codes, if the earlier voice
had none, start at random.
"""

import collections
import json
import re
from pathlib import Path

import torch
from transformers import CsmForConditionalGeneration, MimiModel

from codec import CONTENT_DIM, PULSE_BOOK, codebook_vectors, content_books
from common import FIRST_PHONE

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


def check_codes(codec: MimiModel, earlier: MimiModel):
    """Raises ValueError unless both have the same codebooks, but for the pulses."""
    new, known = (
        torch.stack([codebook_vectors(book)[:, :CONTENT_DIM] for book in content_books(mimi)])
        for mimi in (codec, earlier)
    )
    if not torch.equal(new, known):
        raise ValueError("the codec has other codes than the voice: encode_speech.py --warm-start")


@torch.no_grad()
def transfer(model, checkpoint: Path, run: Path, codec: MimiModel):
    """Fills `model` from the voice in `checkpoint`."""
    earlier = CsmForConditionalGeneration.from_pretrained(checkpoint).float().eval()
    check_codes(codec, earlier.codec_model)
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

    size = model.config.vocab_size
    books = list(range(model.config.num_codebooks))
    if earlier.config.num_codebooks < len(books):
        books.remove(PULSE_BOOK)
    table, known = (
        m.backbone_model.embed_tokens.embed_audio_tokens.weight.unflatten(0, (-1, size))
        for m in (model, earlier)
    )
    table[books] = known
    heads = model.depth_decoder.codebooks_head.weight
    heads[[k - 1 for k in books[1:]]] = earlier.depth_decoder.codebooks_head.weight
    cooler = EXPORTED_TEMPERATURE / SERVED_TEMPERATURE
    heads.mul_(cooler)
    model.lm_head.weight.mul_(cooler)
    print(f"{len(tokens)} of {model.config.text_vocab_size} tokens kept")
