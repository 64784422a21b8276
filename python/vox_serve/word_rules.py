"""Applies a tokenizer's pronouncing dictionary in one pass instead of one pass per word.

The normalizer of the built-in voice has 26,000 rules that each replace one word by its phones, and
7,000 that replace groups of letters in the words that are left. The tokenizers library runs over
the text once per rule: 50 ms for a sentence, after 0.6 s at the start for the rules themselves.
`WordRules` finds these runs of rules and looks words and groups up in dicts; the rules before,
between and after them stay the library's.
"""

import json
import re
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers

MIN_WORDS = 256
"""Fewer rules than these cost less than a millisecond."""

_RULE = re.compile(r"(\(\?<!'\))?\\b([a-z]+(?:'[a-z]+)*)\\b")
_GROUP = re.compile(r"(\(\?<!\[a-z\ue000-\uf8ff]\))?([a-z]+)(\(\?!\[a-z\ue000-\uf8ff]\))?")
_PRIVATE = re.compile("[\ue000-\uf8ff]{1,100}")  # no word characters, so no later rule changes them
_CHUNK = re.compile(r"[\w']+", re.ASCII)
_LETTERS = re.compile("[a-z\ue000-\uf8ff]+")  # and phones
_WORD_CHARS = normalizers.Replace(Regex(r"\w"), "")
_MODEL = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}


class WordRules:
    """Writes texts as the normalizer of a tokenizer.json does.

    Attributes:
        normalizers: the rules before the words, between words and groups, and after these.
        tokenizer_json: the content of that file without its normalizer, for a tokenizer of the
            texts that `normalize` returns.
    """

    def __init__(self, state: dict[str, Any], first: int, last: int):
        """`state` is the content of tokenizer.json, `first` and `last` the run's rules in it."""
        rules = state["normalizer"]["normalizers"]
        are_groups = [_is_rule(rule, _GROUP) for rule in rules[last:]]
        start = last + (are_groups.index(True) if True in are_groups else 0)
        end = start + [*are_groups[start - last :], False].index(False)
        self.normalizers = [
            _normalizer(some) for some in (rules[:first], rules[last:start], rules[end:])
        ]
        self._words: dict[str, tuple[int, bool, str]] = {}  # number, not after ', phones
        for number, rule in enumerate(rules[first:last]):
            found = _RULE.fullmatch(rule["pattern"]["Regex"])
            assert found is not None
            self._words.setdefault(found[2], (number, bool(found[1]), rule["content"]))
        self._max_parts = 1 + max(word.count("'") for word in self._words)
        self._groups: dict[tuple[str, bool, bool], tuple[int, str]] = {}  # number, phones
        for number, rule in enumerate(rules[start:end]):
            found = _GROUP.fullmatch(rule["pattern"]["Regex"])
            assert found is not None
            group = found[2], bool(found[1]), bool(found[3])
            self._groups.setdefault(group, (number, rule["content"]))
        self._max_group = max((len(group) for group, _, _ in self._groups), default=0)
        self.tokenizer_json = json.dumps(state | {"normalizer": None}).encode()

    @classmethod
    def find(cls, data: bytes) -> "WordRules | None":
        """The word rules of a tokenizer.json; None if it has fewer than MIN_WORDS in a row, or
        anything that the split could change."""
        if data.count(b'"Replace"') < MIN_WORDS:
            return None
        state = json.loads(data)
        try:
            rules = state["normalizer"]["normalizers"]
            are_words = [_is_rule(rule, _RULE) for rule in rules]
            if sum(are_words) < MIN_WORDS or state["normalizer"]["type"] != "Sequence":
                return None
            first = are_words.index(True)
            last = are_words.index(False, first) if False in are_words[first:] else len(rules)
            is_plain = all(token["special"] is True for token in state["added_tokens"])
        except (AttributeError, KeyError, TypeError):  # the library says what is wrong
            return None
        return cls(state, first, last) if is_plain and last - first == sum(are_words) else None

    def normalize(self, text: str) -> str:
        """The text as the normalizer writes it."""
        before, between, after = self.normalizers
        text = _CHUNK.sub(self._replace, before.normalize_str(text))
        return after.normalize_str(_LETTERS.sub(self._spell, between.normalize_str(text)))

    def _replace(self, found: re.Match[str]) -> str:
        chunk, text = found[0], found.string
        grows_left = _is_word(text[max(found.start() - 1, 0) : found.start()])
        grows_right = _is_word(text[found.end() : found.end() + 1])
        if "'" not in chunk and not (grows_left or grows_right):
            word = self._words.get(chunk)
            return word[2] if word else chunk
        # Rules match whole parts between apostrophes, or several with the apostrophes between them.
        parts = chunk.split("'")
        matches = []
        last = len(parts) - grows_right
        for start in range(grows_left, last):
            for end in range(start + 1, min(start + self._max_parts, last) + 1):
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

    def _spell(self, found: re.Match[str]) -> str:
        word = found[0]
        if _PRIVATE.fullmatch(word):
            return word
        matches = []
        for start in range(len(word)):
            for end in range(start + 1, min(start + self._max_group, len(word)) + 1):
                for at_start in {False, start == 0}:
                    for at_end in {False, end == len(word)}:
                        if rule := self._groups.get((word[start:end], at_start, at_end)):
                            matches.append((rule[0], start, end, rule[1]))
        pieces: list[str | None] = list(word)
        free = [True] * len(word)
        for _, start, end, phones in sorted(matches):
            if all(free[start:end]):
                free[start:end] = [False] * (end - start)
                pieces[start:end] = [phones, *[None] * (end - start - 1)]
        return "".join(piece for piece in pieces if piece)


def _is_rule(rule: dict[str, Any], kind: re.Pattern[str]) -> bool:
    if rule["type"] != "Replace" or rule.keys() != {"type", "pattern", "content"}:
        return False
    if rule["pattern"].keys() != {"Regex"} or not _PRIVATE.fullmatch(rule["content"]):
        return False
    return kind.fullmatch(rule["pattern"]["Regex"]) is not None


def _is_word(char: str) -> bool:
    r"""True for `\w` of the library's regular expressions; `re` has another one."""
    return char > "\x7f" and _WORD_CHARS.normalize_str(char) == ""


def _normalizer(rules: list[dict[str, Any]]) -> Any:
    """The library's normalizer of a list of rules."""
    sequence = {"type": "Sequence", "normalizers": rules}
    return Tokenizer.from_str(json.dumps({"normalizer": sequence, "model": _MODEL})).normalizer
