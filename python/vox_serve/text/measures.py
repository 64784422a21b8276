# ruff: noqa: RUF001 - patterns on one line; dashes
"""Numerals and the signs beside them as words, by the rules of this folder in their order."""

import re

from vox_serve.text.dates import DATE_RULES, LONE_YEAR_RULES, YEAR_RULES
from vox_serve.text.numbers import cardinal, digits, numeral, ordinal
from vox_serve.text.rules import DASH, END, NUM, START, rule
from vox_serve.text.units import MONEY_RULES, UNIT_RULES
from vox_serve.text.writing import spelt

_DENOMINATORS = {2: ("half", "halves"), 4: ("quarter", "quarters")}
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5"}
_VULGAR |= {"⅗": "3/5", "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8"}
_VULGAR |= {"⅞": "7/8"}
_SUPERSCRIPTS = {"²": " squared", "³": " cubed"}


def spoken_numbers(text: str) -> str:
    """Replace every digit of a text, and the signs that belong to them."""
    if not re.search("[0-9½-¾⅓-⅞]", text):
        return text
    text = re.sub(
        "([0-9])?([½¼¾⅓-⅞])",
        lambda match: f"{match[1] or ''} {_VULGAR.get(match[2], match[2])}".strip(),
        text,
    )
    for pattern, words in _RULES:
        text = pattern.sub(words, text)
    return text


def _run(match: re.Match[str]) -> str:
    """Numbers joined by dashes: two are a range, more are groups of digits."""
    parts = re.split(f"\\s?{DASH}\\s?", match[0])
    if len(parts) == 2:
        return f"{parts[0]} to {parts[1]}"
    return ", ".join(digits(part) if len(part) > 2 else numeral(part) for part in parts)


def _fraction(match: re.Match[str]) -> str:
    whole, top, bottom = match[1], int(match[2]), int(match[3])
    if match[0] in ("24/7", "9/11", "50/50", "20/20"):
        return f"{cardinal(top)} {cardinal(bottom)}"
    if bottom in (0, 1) or top >= bottom or (bottom > 20 and bottom not in (32, 64, 100, 1000)):
        return f"{numeral(whole) + ' ' if whole else ''}{cardinal(top)} over {cardinal(bottom)}"
    one, many = _DENOMINATORS.get(bottom, (ordinal(bottom), ordinal(bottom) + "s"))
    words = f"{cardinal(top)} {one if top == 1 else many}"
    if whole:
        article = "a" if top == 1 else cardinal(top)
        words = f"{numeral(whole)} and {article} {one if top == 1 else many}"
    return words


def _version(match: re.Match[str]) -> str:
    parts = match[2].split(".")
    joint = " dot " if len(parts) == 4 else " point "
    words = joint.join(numeral(part) for part in parts)
    return f"version {words}" if match[1] else words


def _plain(match: re.Match[str]) -> str:
    before = match.string[match.start() - 1 : match.start()]
    after = match.string[match.end() : match.end() + 1]
    left = " " if before.isalpha() else ""
    right = " " if after.isalpha() else ""
    return left + numeral(match[0]) + right


def _ordinal(match: re.Match[str]) -> str:
    number = match[1].replace(",", "")
    return ordinal(int(number)) if len(number) <= 15 else match[0]


def _letter_before(match: re.Match[str]) -> str:
    return f"{spelt(match[1])} "


_RULES = [
    *DATE_RULES,
    # signs before money too
    rule(r"(?<![\w<>])\s?(?:≥|>=)\s?(?=[0-9$€£¥])", " at least "),
    rule(r"(?<![\w<>])\s?(?:≤|<=)\s?(?=[0-9$€£¥])", " at most "),
    rule(r"(?<![\w<>])\s?>\s?(?=[0-9$€£¥])", " more than "),
    rule(r"(?<![\w<>])\s?<\s?(?=[0-9$€£¥])", " less than "),
    rule(r"(?<![\w~])[~≈]\s?(?=[0-9$€£¥])", "about "),
    rule(r"(?<![\w.,)\]%°])(?<![0-9]\s)[-−](?=[$€£¥]?\.?[0-9])", "minus "),
    *MONEY_RULES,
    *YEAR_RULES,
    # ranges
    rule(
        rf"{START}{NUM}(?:\s?{DASH}\s?{NUM}){{1,6}}+(?=\s=)",
        lambda match: re.sub(DASH, " minus ", match[0]),
    ),
    rule(rf"{START}{NUM}(?:\s?{DASH}\s?{NUM})++", _run),
    rule(rf"(?<=[0-9]%|[0-9]°)\s?{DASH}\s?(?=[0-9])", " to "),
    # fractions, versions, ordinals
    rule(rf"{START}(?:([0-9]{{1,6}})\s)?([0-9]{{1,3}})[/⁄]([0-9]{{1,4}}){END}", _fraction),
    rule(r"(?<![\w.])([vV]\.?\s?)?([0-9]{1,9}(?:\.[0-9]{1,9}){2,5})(?![\w])(?!\.[0-9])", _version),
    rule(r"\b[vV](?=[0-9]{1,3}(?:\.[0-9]{1,3})?\b)", "version "),
    rule(
        r"(?<![\w.,])([0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:st|nd|rd|th|ST|ND|RD|TH)\b",
        _ordinal,
    ),
    # signs
    rule(r"(?<=[0-9])\s?([²³])", lambda match: _SUPERSCRIPTS[match[1]]),
    rule(r"(?<![\w#&])#\s?(?=[0-9])", "number "),
    rule(r"(?<=[0-9])\s?[×xX*]\s?(?=[0-9])", " times "),
    rule(r"(?<=[0-9])\s?[+]\s?(?=[0-9])", " plus "),
    rule(r"(?<=[0-9])\s?÷\s?(?=[0-9])", " divided by "),
    rule(r"(?<=[0-9])\s?=\s?(?=[0-9-])", " equals "),
    rule(r"\s?±\s?(?=[0-9])", " plus or minus "),
    rule(r"(?<![\w])\+(?=[0-9])", "plus "),
    rule(r"(?<=[0-9])\+(?=[\s.,!?)]|$)", " plus"),
    *UNIT_RULES,
    *LONE_YEAR_RULES,
    # the rest
    rule(r"(?<![^\W_])([A-Z])-?(?=[0-9])", _letter_before),
    rule(r"[0-9]++(?:[.,][0-9]++)*+|(?<![\w.])\.[0-9]++", _plain),
]
