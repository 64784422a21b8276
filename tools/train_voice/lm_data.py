"""The language model's training examples: tokens, codes, and the time each token is spoken."""

import difflib
import json
import pickle
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from common import FIRST_PHONE, FRAME_SAMPLES, Speech, phone_labels

SEPARATOR = "\uefff"  # joins texts for the normalizer; no rule touches it
LABELS_PER_FRAME = 4


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


def load_examples(run: Path):
    """[dict(tokens, token_ends, codes, labels)] of all encoded utterances; cached."""
    saved = np.load(run / "codes.npz")
    codes, ends = saved["codes"], saved["ends"]
    cache = run / "examples.pickle"
    if cache.exists():
        examples = pickle.loads(cache.read_bytes())
        if len(examples) == len(ends) and examples[0]["codes"].shape[1] == codes.shape[1]:
            return examples
    speech = Speech(run)
    rows = speech.rows[: len(ends)]
    phone_ids = {p: i for i, p in enumerate((run / "phones.txt").read_text().split("\n"))}
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
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
        token_ends = align(["", *symbols, ""], row["phones"])
        # "[0]" and the silence before the first phone belong together.
        token_ends = np.concatenate((np.zeros(3), token_ends))
        frames = codes[ends[index - 1] if index else 0 : ends[index]]
        token_ends[-1] = len(frames) * FRAME_SAMPLES
        labels = phone_labels(
            row, FRAME_SAMPLES // LABELS_PER_FRAME, len(frames) * LABELS_PER_FRAME, phone_ids
        )
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
    cache.write_bytes(pickle.dumps(examples))
    return examples


def spans(example) -> np.ndarray:
    """Share of each frame in which each token sounds: [frames, tokens], rows sum to 1."""
    ends = np.maximum.accumulate(example["token_ends"])
    starts = np.concatenate(([0.0], ends[:-1]))
    edges = np.arange(len(example["codes"]) + 1) * FRAME_SAMPLES
    overlap = np.minimum(ends, edges[1:, None]) - np.maximum(starts, edges[:-1, None])
    return (overlap.clip(min=0) / FRAME_SAMPLES).astype(np.float32)


def collate(examples, num_codebooks: int, multiple: int = 16):
    """One padded batch. With n tokens and T frames, positions are tokens, then frames.

    tokens [B, S], is_text [B, S], codes [B, S, K] (0 at text positions);
    targets [B, S, K]: the frame after each position; after the last frame the all-zero stop frame;
    -100 if there is none;
    spoken [B, S, N]: the share of the next frame in which each token sounds;
    labels [B, S, 4]: phones of the next frame.
    """
    batch = len(examples)
    longest = max(len(e["tokens"]) + len(e["codes"]) for e in examples)
    length = -(-longest // multiple) * multiple
    num_tokens = max(len(e["tokens"]) for e in examples)
    tokens = np.zeros((batch, length), np.int64)
    is_text = np.zeros((batch, length), bool)
    codes = np.zeros((batch, length, num_codebooks), np.int64)
    targets = np.full((batch, length, num_codebooks), -100, np.int64)
    spoken = np.zeros((batch, length, num_tokens), np.float32)
    labels = np.full((batch, length, LABELS_PER_FRAME), -100, np.int64)
    for row, e in enumerate(examples):
        n, frames = len(e["tokens"]), len(e["codes"])
        tokens[row, :n] = e["tokens"]
        is_text[row, :n] = True
        codes[row, n : n + frames] = e["codes"]
        targets[row, n - 1 : n - 1 + frames] = e["codes"]
        targets[row, n - 1 + frames] = 0
        spoken[row, n - 1 : n - 1 + frames, :n] = spans(e)
        labels[row, n - 1 : n - 1 + frames] = e["labels"]
    arrays = dict(
        tokens=tokens, is_text=is_text, codes=codes, targets=targets, spoken=spoken, labels=labels
    )
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def batches(examples, indices, rng, positions: int):
    """Endless batches of indices: examples of similar length, `positions` positions in all."""
    lengths = [len(e["tokens"]) + len(e["codes"]) for e in examples]
    while True:
        order = rng.permutation(indices)
        for start in range(0, len(order), 1500):
            pool = sorted(order[start : start + 1500], key=lambda i: lengths[i])
            groups, group = [], []
            for index in pool:
                if group and (len(group) + 1) * lengths[index] > positions:
                    groups.append(group)
                    group = []
                group.append(index)
            groups.append(group)
            rng.shuffle(groups)
            yield from groups


def describe(examples) -> str:
    frames = sum(len(e["codes"]) for e in examples)
    tokens = sum(len(e["tokens"]) for e in examples)
    return json.dumps(dict(examples=len(examples), frames=frames, tokens=tokens))
