# ruff: noqa: RUF001 - signs
"""English text as people write it, as words to be spoken: docs/text.md lists what is spoken how."""

import re

from vox_serve.text.measures import spoken_numbers
from vox_serve.text.shortenings import without_acronyms, without_shortenings
from vox_serve.text.writing import (
    emoji_names,
    on_one_line,
    without_addresses,
    without_emoji,
    without_emphasis,
    without_invisible,
    without_markup,
)

_STEPS = (
    without_invisible,
    without_markup,
    on_one_line,
    without_addresses,
    without_emphasis,
    without_emoji,
    without_shortenings,
    spoken_numbers,
    without_acronyms,
)
_MAX_PASSES = 5
_SIGNS = {
    "&": " and ",
    "@": " at ",
    "→": " to ",
    "©": " copyright ",
    "®": "",
    "™": "",
    "•": ", ",
    "·": " ",
    "=": " equals ",
    "°": " degrees ",
    "%": " percent ",
    "×": " times ",
    "|": ", ",
    "\\": " ",
    "{": "",
    "}": "",
    "<": " ",
    ">": " ",
    "^": " ",
    "#": " ",
}
_SIGN = re.compile("[" + re.escape("".join(_SIGNS)) + "]")
_JOINED_SENTENCES = re.compile(r"(?<=[a-z)][.!?])(?=[A-Z][a-z])")
_ARROW = re.compile(r"\s?[-=]+>\s?")
_PLUS_PLUS = re.compile(r"(?<=\b[A-Z])\+\+")
_SLASH = re.compile(r"(?<=[^\W_])/(?=[^\W_])")
_SNAKE = re.compile(r"(?<=[^\W_])_+(?=[^\W_])")
_SPACES = re.compile(r"[ \t\u00a0]{2,}|[\t\u00a0]")
_SPACE_BEFORE_SIGN = re.compile(r" +(?=[,.;:!?)](?:[\s,.;:!?)]|$))")
_SIGNS_TWICE = re.compile(r"([,;:])(?: ?[,;:])+|([.!?]) ?,(?=\s)|, ?(?=[.!?](?:\s|$))")


def normalise(text: str) -> str:
    """Write a text's numbers, dates, sums, units, abbreviations and addresses as words.

    A text without any of them comes back unchanged, and so does what this function returned.
    Never raises; takes linear time.
    """
    for _ in range(_MAX_PASSES):
        spoken = _spoken(text)
        if spoken == text:
            break
        text = spoken
    return text


def _spoken(text: str) -> str:
    spoken = _ARROW.sub(" to ", _PLUS_PLUS.sub(" plus plus ", text))
    for step in _STEPS:
        spoken = step(spoken)
    spoken = _JOINED_SENTENCES.sub(" ", spoken)
    spoken = _SLASH.sub(" ", spoken)
    spoken = _SNAKE.sub(" ", spoken)
    spoken = _SIGN.sub(lambda match: _SIGNS[match[0]], spoken)
    if spoken == text:
        return text
    spoken = _SPACES.sub(" ", spoken).strip()
    spoken = _SPACE_BEFORE_SIGN.sub("", spoken)
    spoken = _SIGNS_TWICE.sub(lambda match: match[1] or match[2] or "", spoken)
    if any(map(str.isalnum, spoken)):
        return spoken
    return emoji_names(text) or text
