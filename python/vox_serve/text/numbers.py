# ruff: noqa: SIM905 - word lists read better as text
"""Numbers as English words, the American way: "one hundred five".

Numerals come as text, may have any length, and never raise.
"""

import re

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = ["", *"thousand million billion trillion quadrillion".split()]
MAX_DIGITS = 18
"""Longer numerals are read digit by digit."""

_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_NUMERAL = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?")
_ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}


def cardinal(number: int) -> str:
    """A number of at most `MAX_DIGITS` digits; not negative."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{ONES[hundreds]} hundred" + (f" {cardinal(rest)}" if rest else "")
    words: list[str] = []
    for scale in SCALES:
        number, group = divmod(number, 1000)
        if group:
            words.insert(0, f"{cardinal(group)} {scale}".strip())
    return " ".join(words)


def ordinal(number: int) -> str:
    """ "twenty-first"; bounds as in `cardinal`."""
    words = cardinal(number)
    start = max(words.rfind(" "), words.rfind("-")) + 1
    last = words[start:]
    if last in _ORDINALS:
        return words[:start] + _ORDINALS[last]
    return words[:-1] + "ieth" if last.endswith("y") else words + "th"


def digits(numeral: str) -> str:
    """Digit by digit; other characters are skipped."""
    return " ".join(ONES[ord(c) - 48] for c in numeral if "0" <= c <= "9")


def year(number: int) -> str:
    """A year of four digits: "twenty twenty-four", "nineteen oh five"."""
    century, rest = divmod(number, 100)
    if number % 1000 < 10:
        return cardinal(number)
    if rest == 0:
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def numeral(text: str) -> str:
    """A numeral as it is written: "3,000.50", ".5", "007", "1.2.3"."""
    match = _NUMERAL.fullmatch(text)
    if match is None:
        parts = [part for part in re.split("[.,]", text) if part]
        return digits(text) if parts == [text] else " point ".join(map(numeral, parts))
    whole, decimals = match[1].replace(",", ""), match[2]
    if len(whole) > MAX_DIGITS or (len(whole) > 1 and whole[0] == "0"):
        words = digits(whole)
    elif len(whole) > 6 and "," not in match[1] and not whole.endswith("000"):
        words = digits(whole)  # of an account, a parcel
    else:
        words = cardinal(int(whole)) if whole else ""
    return f"{words} point {digits(decimals)}".strip() if decimals else words


def roman(text: str) -> int | None:
    """The value of a Roman numeral up to 89; None if it is not written the usual way."""
    if not re.fullmatch(r"(?:L?X{0,3}|XL)(?:IX|IV|V?I{0,3})", text) or not text:
        return None
    values = [_ROMAN[letter] for letter in text]
    return sum(
        -value if value < following else value
        for value, following in zip(values, [*values[1:], 0], strict=True)
    )
