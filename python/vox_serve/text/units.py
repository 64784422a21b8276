# ruff: noqa: RUF001 - patterns on one line; dashes
"""Money and units as words."""

import re

from vox_serve.text.numbers import cardinal, numeral
from vox_serve.text.rules import DASH, NUM, START, rule

_SCALE = r"(?:\s?(hundred|thousand|million|billion|trillion|[kKmMbB]n?|tn)(?![\w]))?"
_SCALES = {"k": "thousand", "m": "million", "mn": "million", "b": "billion", "bn": "billion"}
_SCALES["tn"] = "trillion"
_CURRENCIES = {  # one, many, a hundredth of one, hundredths
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "sen", "sen"),
    "₹": ("rupee", "rupees", "paisa", "paise"),
    "₩": ("won", "won", "jeon", "jeon"),
    "₽": ("ruble", "rubles", "kopeck", "kopecks"),
    "CHF": ("Swiss franc", "Swiss francs", "rappen", "rappen"),
}
_CODES = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹", "CHF": "CHF"}
_NATIONS = {"US": "U S ", "U.S.": "U S ", "A": "Australian ", "C": "Canadian ", "CA": "Canadian "}
_NATIONS |= {"NZ": "New Zealand ", "HK": "Hong Kong "}
_UNITS = {
    "mm": "millimeter",
    "cm": "centimeter",
    "m": "meter",
    "km": "kilometer",
    "mi": "mile",
    "ft": "foot/feet",
    "yd": "yard",
    "nm": "nanometer",
    "µm": "micrometer",
    "mg": "milligram",
    "µg": "microgram",
    "g": "gram",
    "kg": "kilogram",
    "lb": "pound",
    "lbs": "pound",
    "oz": "ounce",
    "ml": "milliliter",
    "mL": "milliliter",
    "cl": "centiliter",
    "l": "liter",
    "L": "liter",
    "ns": "nanosecond",
    "µs": "microsecond",
    "ms": "millisecond",
    "s": "second",
    "sec": "second",
    "secs": "second",
    "min": "minute",
    "mins": "minute",
    "h": "hour",
    "hr": "hour",
    "hrs": "hour",
    "yr": "year",
    "yrs": "year",
    "Hz": "hertz/hertz",
    "kHz": "kilohertz/kilohertz",
    "MHz": "megahertz/megahertz",
    "GHz": "gigahertz/gigahertz",
    "V": "volt",
    "mV": "millivolt",
    "kV": "kilovolt",
    "mA": "milliamp",
    "mAh": "milliamp hour",
    "W": "watt",
    "kW": "kilowatt",
    "MW": "megawatt",
    "GW": "gigawatt",
    "Wh": "watt hour",
    "kWh": "kilowatt hour",
    "MWh": "megawatt hour",
    "J": "joule",
    "kJ": "kilojoule",
    "cal": "calorie",
    "kcal": "kilocalorie",
    "Pa": "pascal",
    "kPa": "kilopascal",
    "dB": "decibel",
    "kB": "kilobyte",
    "KB": "kilobyte",
    "MB": "megabyte",
    "GB": "gigabyte",
    "TB": "terabyte",
    "PB": "petabyte",
    "KiB": "kibibyte",
    "MiB": "mebibyte",
    "GiB": "gibibyte",
    "kbps": "kilobit per second",
    "kbit/s": "kilobit per second",
    "Mbps": "megabit per second",
    "Mbit/s": "megabit per second",
    "Gbps": "gigabit per second",
    "MB/s": "megabyte per second",
    "GB/s": "gigabyte per second",
    "px": "pixel",
    "MP": "megapixel",
    "mph": "mile per hour",
    "mpg": "mile per gallon",
    "km/h": "kilometer per hour",
    "kph": "kilometer per hour",
    "kmh": "kilometer per hour",
    "m/s": "meter per second",
    "m/s²": "meter per second squared",
    "rpm": "revolution per minute",
    "bpm": "beat per minute",
    "fps": "frame per second",
    "dpi": "dot per inch",
    "ha": "hectare",
    "m²": "square meter",
    "m2": "square meter",
    "m^2": "square meter",
    "m³": "cubic meter",
    "m3": "cubic meter",
    "km²": "square kilometer",
    "km2": "square kilometer",
    "cm²": "square centimeter",
    "cm³": "cubic centimeter",
    "sq ft": "square foot/square feet",
    "sq mi": "square mile",
    "sq km": "square kilometer",
    "ft²": "square foot/square feet",
    "°C": "degree Celsius",
    "° C": "degree Celsius",
    "ºC": "degree Celsius",
    "℃": "degree Celsius",
    "°F": "degree Fahrenheit",
    "° F": "degree Fahrenheit",
    "ºF": "degree Fahrenheit",
    "℉": "degree Fahrenheit",
    "°": "degree",
    "Ω": "ohm",
    "kΩ": "kilohm",
}
"""One, or one and many, by symbol."""
_UNIT = "|".join(re.escape(unit) for unit in sorted(_UNITS, key=len, reverse=True))


def counted(words: str, unit: str) -> str:
    """A number's words with its unit, given as "foot/feet" or in the singular."""
    one, _, many = unit.partition("/")
    if words == "one":
        return f"{words} {one}"
    if not many:
        head, per, rest = one.partition(" per ")
        degree, space, scale = head.partition(" ")
        if degree == "degree":
            head = f"degrees{space}{scale}"
        else:
            head += "s"
        many = head + per + rest
    return f"{words} {many}"


def _money(match: re.Match[str]) -> str:
    return _amount(match[2], match[3], match[4], _NATIONS.get(match[1] or "", ""))


def _money_after(match: re.Match[str]) -> str:
    return _amount(_CODES.get(match[3], match[3]), match[1], match[2], "")


def _money_range(match: re.Match[str]) -> str:
    return f"{numeral(match[2])} to {match[1]}{match[3]}"


def _money_code(match: re.Match[str]) -> str:
    return _amount(_CODES[match[1]], match[2], match[3], "")


def _amount(currency: str, amount: str, scale: str | None, nation: str) -> str:
    one, many, _, _ = _CURRENCIES[currency]
    if scale:
        scale = _SCALES.get(scale.casefold(), scale)
        return f"{numeral(amount)} {scale} {nation}{many}"
    whole, _, decimals = amount.partition(".")
    if len(decimals) != 2:
        return f"{numeral(amount)} {nation}{one if amount == '1' else many}"
    words = f"{numeral(whole)} {nation}{one if whole == '1' else many}"
    if decimals == "00":
        return words
    cents = _cents(currency, decimals)
    return cents if whole.strip("0") == "" else f"{words} and {cents}"


def _cents(currency: str, count: str) -> str:
    _, _, one, many = _CURRENCIES[currency]
    return f"{cardinal(int(count))} {one if int(count) == 1 else many}"


def _measure(match: re.Match[str]) -> str:
    words, unit = numeral(match[1]), _UNITS[match[3]]
    if match[2] == "-":  # "a 5-km run"
        return f"{words}-{unit.partition('/')[0]}"
    return counted(words, unit)


def _feet(match: re.Match[str]) -> str:
    words = counted(numeral(match[1]), "foot/feet")
    return f"{words} {counted(numeral(match[2]), 'inch/inches')}"


MONEY_RULES = [
    rule(
        rf"([$€£¥₹₩₽])\s?({NUM})\s?(?:{DASH}|to)\s?\1?({NUM})(?!\s?{DASH}\s?[0-9])",
        _money_range,
    ),
    rule(
        rf"(?<![\w])(?:(US|U\.S\.|CA|NZ|HK|A|C)\s?)?([$€£¥₹₩₽])\s?({NUM}|\.[0-9]++){_SCALE}",
        _money,
    ),
    rule(rf"{START}({NUM}){_SCALE}\s?([€£¥₹₩₽]|(?:USD|EUR|GBP|JPY|INR|CHF)\b)", _money_after),
    rule(rf"\b(USD|EUR|GBP|JPY|INR|CHF)\s?({NUM}){_SCALE}", _money_code),
    rule(rf"{START}([0-9]{{1,2}})\s?¢", lambda match: _cents("$", match[1])),
]
UNIT_RULES = [
    rule(rf"{START}([0-9]{{1,2}})['′]\s?([0-9]{{1,2}})(?:[\"″]|'')", _feet),
    rule(rf"(?<![0-9])({NUM})\s?(?:%|percent\b)", lambda match: f"{numeral(match[1])} percent"),
    rule(
        rf"(?<![\w])(?<![0-9][.,])(?<![A-Za-z]-)({NUM}|\.[0-9]++)([\s-]?)({_UNIT})(?![\w²³^])(?:\.(?=\s[a-z0-9]))?",
        _measure,
    ),
    rule(rf"(?<![\w])({NUM})\s?[kK]\b(?!\.[a-z])", lambda match: f"{numeral(match[1])} K"),
    rule(
        r"(?<![\w])([0-9]{1,4}):([0-9]{1,4})(?![\w:])",
        lambda match: f"{numeral(match[1])} to {numeral(match[2])}",
    ),
]
