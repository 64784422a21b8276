"""Applies a tokenizer's pronouncing dictionary in one pass instead of one pass per word.

The normalizer of the built-in voice has 17,000 rules that each replace one word by its phones. The
tokenizers library runs over the text once per rule: 13 ms for a sentence. `WordRules` finds such a
run of rules and looks the words up in a dict; the rules before and after it stay the library's.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer

MIN_WORDS = 256
"""Fewer rules than these cost less than a millisecond."""

MAX_CHARS = 512
"""Longer texts go to the library: then a client that sends many of them waits for its own tokens,
and others do not wait for its long prompts. A text of 300 characters takes the library 27 ms, and
1 ms here."""

_RULE = re.compile(r"(\(\?<!'\))?\\b([a-z]+(?:'[a-z]+)*)\\b")
_PRIVATE = re.compile("[\ue000-\uf8ff]+")  # no word characters, so no later rule changes them
_CHUNK = re.compile(r"[\w']+", re.ASCII)
_MODEL = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}


class WordRules:
    """The normalizer of one tokenizer, split at its run of word rules.

    `tokenizer` encodes the texts that `normalize` returns: it is a copy of the original without its
    normalizer.
    """

    def __init__(self, state: dict[str, Any], first: int, last: int):
        """`state` is the content of tokenizer.json, `first` and `last` the run's rules in it."""
        rules = state["normalizer"]["normalizers"]
        self._before = _normalizer(rules[:first])
        self._after = _normalizer(rules[last:])
        self._words: dict[str, tuple[int, bool, str]] = {}  # number, not after ', phones
        for number, rule in enumerate(rules[first:last]):
            found = _RULE.fullmatch(rule["pattern"]["Regex"])
            assert found is not None
            self._words.setdefault(found[2], (number, bool(found[1]), rule["content"]))
        self._max_parts = 1 + max(word.count("'") for word in self._words)
        self.tokenizer = Tokenizer.from_str(json.dumps(state | {"normalizer": None}))

    @classmethod
    def find(cls, tokenizer: Tokenizer) -> "WordRules | None":
        """The word rules of a tokenizer; None if it has fewer than MIN_WORDS in a row, or anything
        that the split could change."""
        if tokenizer.normalizer is None:
            return None
        normalizer = json.loads(tokenizer.normalizer.__getstate__())
        rules = normalizer.get("normalizers", ())
        are_words = [_is_word_rule(rule) for rule in rules]
        if sum(are_words) < MIN_WORDS:
            return None
        first = are_words.index(True)
        last = are_words.index(False, first) if False in are_words[first:] else len(rules)
        state = json.loads(tokenizer.to_str())
        if last - first < sum(are_words) or not all(t["special"] for t in state["added_tokens"]):
            return None
        return cls(state, first, last)

    def normalize(self, text: str) -> str | None:
        """The text as the original normalizer writes it; None if the library should do it.

        That is so for a long text, and for one that is not all ASCII: the library and Python may
        disagree on which of its characters belong to a word.
        """
        if len(text) > MAX_CHARS:
            return None
        text = self._before.normalize_str(text)
        if not text.isascii():
            return None
        return self._after.normalize_str(_CHUNK.sub(self._replace, text))

    def _replace(self, found: re.Match[str]) -> str:
        chunk = found[0]
        if "'" not in chunk:
            word = self._words.get(chunk)
            return word[2] if word else chunk
        # Rules match whole parts between apostrophes, or several with the apostrophes between them.
        parts = chunk.split("'")
        matches = []
        for start in range(len(parts)):
            for end in range(start + 1, min(start + self._max_parts, len(parts)) + 1):
                word = self._words.get("'".join(parts[start:end]))
                if word and not (word[1] and start > 0):
                    matches.append((word[0], start, end, word[2]))
        used = [False] * len(parts)
        replaced: dict[int, tuple[int, str]] = {}
        for _, start, end, phones in sorted(matches):  # rules apply in turn, from left to right
            if not any(used[start:end]):
                used[start:end] = [True] * (end - start)
                replaced[start] = end, phones
        made, at = [], 0
        while at < len(parts):
            end, piece = replaced.get(at, (at + 1, parts[at]))
            made.append(piece)
            at = end
        return "'".join(made)


def _is_word_rule(rule: dict[str, Any]) -> bool:
    if rule["type"] != "Replace" or not _PRIVATE.fullmatch(rule["content"]):
        return False
    return _RULE.fullmatch(rule["pattern"].get("Regex", "")) is not None


def _normalizer(rules: list[dict[str, Any]]) -> Any:
    """The library's normalizer of a list of rules."""
    sequence = {"type": "Sequence", "normalizers": rules}
    return Tokenizer.from_str(json.dumps({"normalizer": sequence, "model": _MODEL})).normalizer
