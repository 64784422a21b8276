# ruff: noqa: E501, RUF001 - patterns on one line; dashes
"""Rules from numerals to words: what their modules share."""

import re
from collections.abc import Callable

Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]
"""Each pattern is free of backtracking over long runs: its quantifiers are possessive or bounded."""

NUM = r"[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?+"
START = r"(?<![\w])(?<![0-9][.,:/-])"
END = r"(?![\w])(?![.,:/-][0-9])"
DASH = "[-–—−‑]"
YEAR = r"([12][0-9]{3})"


def rule(pattern: str, words: Callable[[re.Match[str]], str] | str, flags: int = 0) -> Rule:
    if isinstance(words, str):
        return re.compile(pattern, flags), lambda match: match.expand(words)
    return re.compile(pattern, flags), words
