"""Builds the text tokenizer from a GGUF file's metadata."""

import json
import re
from collections.abc import Mapping
from typing import Any

TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The words into which Llama 3's tokenizer divides a text."""

_SPECIAL = re.compile(r"<\|[^|]+\|>")


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """True if a file's metadata have tokens and merges."""
    return all(isinstance(metadata.get(key), list) for key in (TOKENS, MERGES))


def tokenizer_json(metadata: Mapping[str, Any]) -> bytes:
    """The tokenizer of a file with Llama 3's kind of tokens, as a tokenizer.json.

    CrispASR stores tokens and merges, but not how a text is divided into words: that is Llama 3's
    way, which CSM uses. Tokens such as `<|begin_of_text|>` at the end of the list are special.

    Args:
        metadata: a file's, for which `has_tokenizer` is true.

    Raises:
        ValueError: tokens or merges are contradictory.
    """
    tokens, merges = metadata[TOKENS], metadata[MERGES]
    num_words = len(tokens)
    while num_words and (not tokens[num_words - 1] or _SPECIAL.fullmatch(tokens[num_words - 1])):
        num_words -= 1
    vocabulary = {token: i for i, token in enumerate(tokens[:num_words]) if token}
    if len(vocabulary) != sum(map(bool, tokens[:num_words])):
        raise ValueError(f"{TOKENS} has a token twice")
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i in range(num_words, len(tokens))
        if tokens[i]
    ]
    words = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    settings = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, letters]},
        "decoder": {**letters, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(settings).encode()
