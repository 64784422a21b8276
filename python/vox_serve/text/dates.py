# ruff: noqa: RUF001, SIM905 - patterns on one line; dashes; word lists read better as text
"""Telephone numbers, dates, times and years as words."""

import re

from vox_serve.text.numbers import cardinal, digits, numeral, ordinal, year
from vox_serve.text.rules import DASH, END, START, YEAR, rule
from vox_serve.text.units import counted

_MONTHS = (
    "January February March April May June July August September October November December".split()
)
_MONTH = (
    r"(Jan(?:uary|\.)?|Feb(?:ruary|\.)?|March|Mar\.|April|Apr\.?|May|June|Jun\.?|July|Jul\.?"
    r"|Aug(?:ust|\.)?|Sept(?:ember|\.)?|Sep\.?|Oct(?:ober|\.)?|Nov(?:ember|\.)?|Dec(?:ember|\.)?)"
)
_HALF = r"([aApP]\.?\s?[mM](?:\.|\b))"
_DAY = r"(0?[1-9]|[12][0-9]|3[01])"


def _month_name(text: str) -> str:
    return next(month for month in _MONTHS if month.startswith(text[:3]))


def _written_date(match: re.Match[str]) -> str:
    """ "Dec 25, 2024" and "December 25th"."""
    return _date(_MONTHS.index(_month_name(match[1])) + 1, int(match[2]), match[3], match[0])


def _day_first_date(match: re.Match[str]) -> str:
    """ "25 December 2024": day, month and perhaps a year."""
    end = f", {year(int(match[3]))}" if match[3] else ""
    before = match.string[max(0, match.start() - 4) : match.start()]
    article = "" if before.lower() == "the " else "the "
    return f"{article}{ordinal(int(match[1]))} of {_month_name(match[2])}{end}"


def _date(month: int, day: int, year_digits: str | None, otherwise: str) -> str:
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return otherwise
    words = f"{_MONTHS[month - 1]} {ordinal(day)}"
    return f"{words}, {year(_full_year(year_digits))}" if year_digits else words


def _full_year(year_digits: str) -> int:
    number = int(year_digits)
    if len(year_digits) > 2:
        return number
    return number + (1900 if number > 68 else 2000)


def _slashed_date(match: re.Match[str]) -> str:
    """ "12/25/2024": the month first, unless only the second number can be one."""
    month, day = int(match[1]), int(match[3])
    if month > 12:
        month, day = day, month
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return match[0].replace(match[2], " ")
    return _date(month, day, match[4], match[0])


def _iso_date(match: re.Match[str]) -> str:
    return _date(int(match[2]), int(match[3]), match[1], match[0].replace("-", " "))


def _dotted_date(match: re.Match[str]) -> str:
    return _date(int(match[2]), int(match[1]), match[3], match[0].replace(".", " "))


def _time(match: re.Match[str]) -> str:
    hour, minute, second, half = int(match[1]), int(match[2]), match[3], match[4]
    if hour > 24 or minute > 59:
        return f"{cardinal(hour)} {cardinal(minute)}" + (f" {numeral(second)}" if second else "")
    words = cardinal(hour)
    if minute or second:
        words += f" oh {cardinal(minute)}" if minute < 10 else f" {cardinal(minute)}"
    elif not half:
        words += " o'clock" if 1 <= hour <= 12 else " hundred hours" if hour else " hours"
    if second:
        words += f" and {counted(cardinal(int(second)), 'second')}"
    return f"{words} {_half(half, match)}".strip() if half else words


def _half(half: str, match: re.Match[str]) -> str:
    """ "ay M" or "P M", with the full stop of "p.m." where a sentence ends."""
    words = "ay M" if half[0] in "aA" else "P M"
    following = match.string[match.end() :][:3]
    ends = half.endswith(".") and (
        not following.strip() or (following[0].isspace() and following.strip()[:1].isupper())
    )
    return words + ("." if ends else "")


def _hour(match: re.Match[str]) -> str:
    return f"{cardinal(int(match[1]))} {_half(match[2], match)}"


def _phone(match: re.Match[str]) -> str:
    plus = "plus " if match[0].lstrip(" (").startswith("+") else ""
    groups = re.findall("[0-9]+", match[0])
    return plus + ", ".join(digits(group) for group in groups)


def _short_phone(match: re.Match[str]) -> str:
    if int(match[2]) % 50 == 0:  # more likely a range
        return match[0]
    return f"{digits(match[1])}, {digits(match[2])}"


def _years(match: re.Match[str]) -> str:
    first, second = match[1], match[2]
    if len(second) == 2:
        return f"{year(int(first))} to {numeral(second)}"
    return f"{year(int(first))} to {year(int(second))}"


def _decade(match: re.Match[str]) -> str:
    century, tens = match[1] or "", int(match[2])
    if tens == 0:
        words = year(int(century + "00")) if century else "zero"
    else:
        words = f"{cardinal(int(century))} " if century else ""
        words += cardinal(tens)
    return words[:-1] + "ies" if words.endswith("y") else words + "s"


def _stand_alone_year(match: re.Match[str]) -> str:
    return year(int(match[0]))


DATE_RULES = [
    # telephones
    rule(
        rf"{START}\+[0-9]{{1,3}}[\s.-]?(?:\([0-9]{{1,4}}\)[\s.-]?)?[0-9]{{2,5}}"
        rf"(?:[\s.-]?[0-9]{{2,5}}){{1,4}}{END}",
        _phone,
    ),
    rule(
        rf"(?<![\w])(?:1[\s.-])?(?:\([0-9]{{3}}\)\s?|[0-9]{{3}}[.-])[0-9]{{3}}[\s.-][0-9]{{4}}{END}",
        _phone,
    ),
    rule(rf"{START}1-8[0-9]{{2}}-[0-9]{{3}}-[0-9]{{4}}{END}", _phone),
    rule(rf"{START}([0-9]{{3}})-([0-9]{{4}}){END}", _short_phone),
    rule(
        r"\b([Cc]all|[Dd]ial|[Pp]hone|[Cc]ode|PIN|ZIP|extension|ext\.|[A-Z]{2})\s([0-9]{3,12})\b(?![.,:%/-]?[0-9])",
        lambda match: (
            f"{match[1]} {digits(match[2])}"
            if match[1] != match[1].upper() or match[1] in ("PIN", "ZIP") or len(match[2]) == 5
            else match[0]
        ),
    ),
    # dates
    rule(rf"{START}{YEAR}-(0[1-9]|1[0-2])-{_DAY}(?![\w-])", _iso_date),
    rule(
        rf"{START}([0-9]{{1,2}})([/.-])([0-9]{{1,2}})\2([0-9]{{4}}|[0-9]{{2}}){END}",
        lambda match: _slashed_date(match) if match[2] != "." else match[0],
    ),
    rule(rf"{START}{_DAY}\.(0?[1-9]|1[0-2])\.{YEAR}{END}", _dotted_date),
    rule(rf"\b{_MONTH}\s{_DAY}(?:st|nd|rd|th)?(?:,?\s{YEAR})?{END}", _written_date),
    rule(
        rf"{START}{_DAY}(?:st|nd|rd|th)?\s(?:of\s)?{_MONTH}(?![\w])(?:,?\s{YEAR}{END})?",
        _day_first_date,
    ),
    rule(
        rf"\b{_MONTH},?\s{YEAR}{END}",
        lambda match: f"{_month_name(match[1])} {year(int(match[2]))}",
    ),
    # times
    rule(
        rf"{START}([01]?[0-9]|2[0-4]):([0-5][0-9])(?::([0-5][0-9]))?(?:\s?{_HALF})?(?![\w:])",
        _time,
    ),
    rule(rf"{START}(1[0-2]|0?[1-9])\s?{_HALF}(?![\w])", _hour),
]
YEAR_RULES = [
    rule(rf"{START}'?([0-9]{{2}})?([0-9]0)['’]?s\b", _decade),
    rule(rf"{START}{YEAR}\s?{DASH}\s?{YEAR}{END}", _years),
    rule(rf"{START}((?:18|19|20)[0-9]{{2}})[-–/]([0-9]{{2}})(?![\w/-])", _years),
]
LONE_YEAR_RULES = [
    rule(
        rf"(?<![\w.,])(?:(?<=\b(?:in|by|of|to)\s)|(?<=\bsince\s)|(?<=\b(?:from|year)\s)"
        rf"|(?<=\b(?:until|after|early)\s)|(?<=\b(?:during|before)\s)|(?<=\band\s)|(?<=\bcirca\s)|(?<=\())"
        rf"1[0-9]{{3}}{END}",
        _stand_alone_year,
    ),
    rule(rf"(?<![\w.,])(?:19|20)[0-9]{{2}}{END}", _stand_alone_year),
    rule(rf"(?<![\w.,])1[1-9]00{END}", _stand_alone_year),
]
