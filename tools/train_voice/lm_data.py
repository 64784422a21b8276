"""The language model's training examples: tokens, codes, and the time each token is spoken."""

import difflib
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from common import FIRST_PHONE, FRAME_SAMPLES, Speech
from lm import MAX_POSITIONS

SEPARATOR = "\uefff"  # joins texts for the normalizer; no rule touches it
LABELS_PER_FRAME = 4
CONTEXT_SHARE = 0.5  # of the training sequences begin with earlier segments
MAX_CONTEXT = 3  # earlier segments; both speakers occur, in any order
POOL = 2000  # examples that are sorted by length together


def normalize_all(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """Normalizes texts, 200 joined at a time: every rule costs a pass over its input."""
    found = []
    for start in range(0, len(texts), 200):
        joined = SEPARATOR.join(texts[start : start + 200])
        found += tokenizer.normalizer.normalize_str(joined).split(SEPARATOR)
    return [text.rstrip(" ") for text in found]


def align(symbols: list[str], phones: list) -> np.ndarray:
    """End sample of every symbol: that of its phone where both sequences agree; elsewhere symbols
    share the time evenly."""
    names = [phone for phone, _ in phones]
    starts = [0] + [end for _, end in phones]
    ends = np.zeros(len(symbols))
    matcher = difflib.SequenceMatcher(None, symbols, names, autojunk=False)
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            ends[i1:i2] = starts[j1 + 1 : j2 + 1]
        else:
            ends[i1:i2] = np.linspace(starts[j1], starts[j2], i2 - i1 + 1)[1:]
    return ends


def align_text(symbols: list[str], phones: list) -> np.ndarray:
    """End sample of every symbol of a text, and of the silences around it. A question mark before a
    word is not spoken and takes no time."""
    early = [i for i, s in enumerate(symbols) if s == "?" and (i == 0 or symbols[i - 1] in " ,")]
    spoken = [symbol for i, symbol in enumerate(symbols) if i not in early]
    ends = align(["", *spoken, ""], phones)
    after = [i - number for number, i in enumerate(early)]  # index in `ends` of what is before it
    return np.insert(ends, [i + 1 for i in after], ends[after])


def load_examples(run: Path):
    """[dict(tokens, token_ends, codes, labels)] of all encoded utterances; cached."""
    saved = np.load(run / "codes.npz")
    codes, ends = saved["codes"], saved["ends"]
    tokenizer_path, cache = run / "tokenizer.json", run / "examples.pickle"
    source = codes.tobytes() + ends.tobytes() + tokenizer_path.read_bytes()
    key = hashlib.sha256(source).hexdigest()
    if cache.exists():
        cached_key, examples = pickle.loads(cache.read_bytes())
        if cached_key == key:
            return examples
    speech = Speech(run)
    rows = speech.rows[: len(ends)]
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    spelling = (run / "token_phones.txt").read_text().split("\n")
    vocab = tokenizer.get_vocab()
    bos, eos = vocab["<|begin_of_text|>"], vocab["<|end_of_text|>"]
    texts = normalize_all(tokenizer, [f"[{row['speaker']}]{row['text']}" for row in rows])
    examples = []
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        tokens = [bos, *(vocab.get(char, vocab["<unk>"]) for char in text), eos]
        symbols = [
            spelling[ord(char) - FIRST_PHONE] if 0 <= ord(char) - FIRST_PHONE < 0x400 else char
            for char in text[3:]
        ]
        token_ends = align_text(symbols, row["phones"])
        # "[0]" and the silence before the first phone belong together.
        token_ends = np.concatenate((np.zeros(3), token_ends))
        frames = codes[ends[index - 1] if index else 0 : ends[index]]
        token_ends[-1] = len(frames) * FRAME_SAMPLES
        labels = speech.labels(index, FRAME_SAMPLES // LABELS_PER_FRAME)
        examples.append(
            dict(
                tokens=np.array(tokens),
                token_ends=token_ends,
                codes=frames,
                labels=labels.reshape(-1, LABELS_PER_FRAME),
            )
        )
    for example, row in list(zip(examples, rows, strict=True))[:50]:
        whole = tokenizer.encode(f"[{row['speaker']}]{row['text']}").ids
        assert whole == example["tokens"].tolist(), row["text"]
    cache.write_bytes(pickle.dumps((key, examples)))
    return examples


def spans(example) -> np.ndarray:
    """Share of each frame in which each token sounds: [frames, tokens], rows sum to 1."""
    ends = np.maximum.accumulate(example["token_ends"])
    starts = np.concatenate(([0.0], ends[:-1]))
    edges = np.arange(len(example["codes"]) + 1) * FRAME_SAMPLES
    overlap = np.minimum(ends, edges[1:, None]) - np.maximum(starts, edges[:-1, None])
    return (overlap.clip(min=0) / FRAME_SAMPLES).astype(np.float32)


def length_of(sequence) -> int:
    """Positions of a list of examples: tokens, frames and a stop frame after all but the last."""
    return sum(len(e["tokens"]) + len(e["codes"]) + 1 for e in sequence) - 1


def collate(sequences, num_codebooks: int, multiple: int = 16):
    """One padded batch of sequences: lists of examples, each the context of the next.

    As in vox_serve's prompts, the positions of an example are its n tokens, its T frames and, if
    another example follows, an all-zero stop frame.

    tokens [B, S], is_text [B, S], codes [B, S, K] (0 at text positions and stop frames);
    targets [B, S, K]: the frame after each position; after the last frame the all-zero stop frame;
    -100 if there is none;
    spoken [B, S, N]: the share of the next frame in which the token at each position sounds;
    labels [B, S, 4]: phones of the next frame.
    """
    batch = len(sequences)
    longest = max(length_of(sequence) for sequence in sequences)
    length = -(-longest // multiple) * multiple
    num_keys = max(length_of(s) - len(s[-1]["codes"]) for s in sequences)
    tokens = np.zeros((batch, length), np.int64)
    is_text = np.zeros((batch, length), bool)
    codes = np.zeros((batch, length, num_codebooks), np.int64)
    targets = np.full((batch, length, num_codebooks), -100, np.int64)
    spoken = np.zeros((batch, length, num_keys), np.float32)
    labels = np.full((batch, length, LABELS_PER_FRAME), -100, np.int64)
    for row, sequence in enumerate(sequences):
        start = 0
        for e in sequence:
            first = start + len(e["tokens"])
            end = first + len(e["codes"])
            tokens[row, start:first] = e["tokens"]
            is_text[row, start:first] = True
            codes[row, first:end] = e["codes"]
            targets[row, first - 1 : end - 1] = e["codes"]
            targets[row, end - 1] = 0
            spoken[row, first - 1 : end - 1, start:first] = spans(e)
            labels[row, first - 1 : end - 1] = e["labels"]
            start = end + 1
    arrays = dict(
        tokens=tokens, is_text=is_text, codes=codes, targets=targets, spoken=spoken, labels=labels
    )
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def with_context(indices, lengths, rng):
    """Cuts indices into sequences of 1 to 1 + MAX_CONTEXT examples, of at most MAX_POSITIONS."""
    sequences, start = [], 0
    while start < len(indices):
        count = 1 + (rng.random() < CONTEXT_SHARE) * rng.integers(1, MAX_CONTEXT + 1)
        sequence = [indices[start]]
        for index in indices[start + 1 : start + count]:
            if sum(lengths[i] + 1 for i in sequence) + lengths[index] > MAX_POSITIONS:
                break
            sequence.append(index)
        sequences.append(sequence)
        start += len(sequence)
    return sequences


def batches(examples, indices, rng, positions: int):
    """Endless batches of sequences of indices: sequences of similar length, `positions` in all."""
    lengths = [len(e["tokens"]) + len(e["codes"]) for e in examples]

    def size(sequence):
        return sum(lengths[i] + 1 for i in sequence) - 1

    while True:
        order = rng.permutation(indices)
        for start in range(0, len(order), POOL):
            pool = sorted(with_context(order[start : start + POOL], lengths, rng), key=size)
            groups, group = [], []
            for sequence in pool:
                if group and (len(group) + 1) * size(sequence) > positions:
                    groups.append(group)
                    group = []
                group.append(sequence)
            groups.append(group)
            rng.shuffle(groups)
            yield from groups


def describe(examples) -> str:
    frames = sum(len(e["codes"]) for e in examples)
    tokens = sum(len(e["tokens"]) for e in examples)
    return json.dumps(dict(examples=len(examples), frames=frames, tokens=tokens))
