# ruff: noqa: E501, RUF001, SIM905 - word lists read better as text; quotation marks
"""Abbreviations, acronyms and Roman numerals as words. Only what is safe: the rest stays."""

import re

from vox_serve.text.abbreviations import STARTERS
from vox_serve.text.numbers import cardinal, ordinal, roman
from vox_serve.text.writing import spelt

_TITLES = {
    "Dr": "Doctor",
    "Prof": "Professor",
    "Rev": "Reverend",
    "Hon": "Honorable",
    "Gen": "General",
    "Col": "Colonel",
    "Lt": "Lieutenant",
    "Sgt": "Sergeant",
    "Capt": "Captain",
    "Maj": "Major",
    "Adm": "Admiral",
    "Gov": "Governor",
    "Sen": "Senator",
    "Rep": "Representative",
    "Pres": "President",
    "Fr": "Father",
    "Mt": "Mount",
    "Ft": "Fort",
}
"""Before a name."""

_TITLE = re.compile(rf"\b({'|'.join(_TITLES)})\.(\s?)(?=[A-Z])")
_BARE_TITLE = re.compile(r"\b(Dr|Prof)(?=\s[A-Z][a-z])")
_LONE_TITLE = re.compile(r"\b(Dr|Prof)\.(?!\w)")

_WORDS = {
    "e.g.": "for example",
    "eg.": "for example",
    "i.e.": "that is",
    "ie.": "that is",
    "etc.": "et cetera",
    "et al.": "and others",
    "vs.": "versus",
    "cf.": "compare",
    "viz.": "namely",
    "approx.": "approximately",
    "ca.": "circa",
    "a.k.a.": "also known as",
    "incl.": "including",
    "excl.": "excluding",
    "dept.": "department",
    "univ.": "university",
    "govt.": "government",
    "esp.": "especially",
    "resp.": "respectively",
    "misc.": "miscellaneous",
    "tel.": "telephone",
    "est.": "established",
    "inc.": "incorporated",
    "ltd.": "limited",
    "corp.": "corporation",
    "bros.": "brothers",
    "jr.": "junior",
    "sr.": "senior",
    "ave.": "avenue",
    "blvd.": "boulevard",
    "rd.": "road",
    "hwy.": "highway",
    "apt.": "apartment",
    "hrs.": "hours",
    "hr.": "hour",
    "mins.": "minutes",
    "secs.": "seconds",
    "yrs.": "years",
    "lbs.": "pounds",
    "oz.": "ounces",
    "ph.d.": "P H D",
    "o.k.": "OK",
    "w/o": "without",
    "w/": "with",
    "b/c": "because",
}
_WORD = re.compile(
    r"(?<![\w.])(" + "|".join(re.escape(word) for word in _WORDS) + r")(?!\w)", re.IGNORECASE
)
_VERSUS = re.compile(r"(?<=\s)vs(?=\s)")
_DAYS = {"Mon": "Monday", "Tue": "Tuesday", "Tues": "Tuesday", "Wed": "Wednesday"}
_DAYS |= {"Thu": "Thursday", "Thur": "Thursday", "Thurs": "Thursday", "Fri": "Friday"}
_MONTHS = {"Jan": "January", "Feb": "February", "Apr": "April", "Aug": "August"}
_MONTHS |= {"Sep": "September", "Sept": "September", "Oct": "October", "Nov": "November"}
_MONTHS |= {"Dec": "December", "Sat": "Saturday"}
_NAMES = _DAYS | _MONTHS
_NAME = re.compile(rf"\b({'|'.join(_NAMES)})\.(?!\w)")
_WITH_NUMBERS = {
    "No": "number",
    "Nos": "numbers",
    "Nr": "number",
    "Fig": "figure",
    "Figs": "figures",
    "Vol": "volume",
    "Ch": "chapter",
    "Chap": "chapter",
    "Sec": "section",
    "Eq": "equation",
    "Art": "article",
    "Pt": "part",
    "pp": "pages",
    "p": "page",
    "c": "circa",
}
_WITH_NUMBER = re.compile(rf"\b({'|'.join(_WITH_NUMBERS)})\.\s?(?=[0-9])", re.IGNORECASE)
_NUMERO = re.compile(r"№\s?|\bN[°º]\s?(?=[0-9])")
_SECTION = re.compile(r"§\s?(?=[0-9])")
_SAINT = re.compile(r"\bSt\.?(?=\s[A-Z][a-z])|\bSt\.(?!\w)")

_LETTERS = re.compile(r"(?<![\w.@])((?:[A-Za-z]\.){2,6})(?!\w)")
_INITIAL = re.compile(r"(?<![\w.'’])([A-HJ-Z])\.(?=\s([A-Z])(?:\.|[a-z]{1,20}))")
_MERIDIEM = re.compile(r"\b([aApP])\.\s?[mM](?:\.|\b)")
_ACRONYM = re.compile(r"(?<![\w.'&-])([A-Z]{2,6})(['’]?s)?(?![\w&])(?!\.\w)")
_DEGREES = {"PhD": "P H D", "BSc": "B S C", "MSc": "M S C", "eBay": "E bay", "iOS": "I O S"}
_DEGREE = re.compile(rf"\b(?:{'|'.join(_DEGREES)})\b")
_SPELT = frozenset(
    "FBI CIA NSA USA UK EU UN BBC CNN NBC ABC CBS HBO MTV IBM AMD AT API URL HTML CSS PDF CPU GPU "
    "USB DVD CD DNA RNA HIV MRI ATM CEO CFO CTO COO VIP FAQ DIY ID UFO AI ML UI UX OS SQL XML HTTP "
    "HTTPS PHP TCP IP LLC GDP PR HR IQ EV SUV RV ETA FYI ASAP LA NY NYC DC UAE EPA FAA IRS AC DJ MC "
    "OCR LED OLED NBA NFL MLB NHL UEFA WWE IOU GMO PTA RSVP UPS USPS DOI IDE SDK AWS IOT ISP UTC".split()
) - {"AT", "UEFA", "LA"}
_SPOKEN_AS_WORDS = frozenset(
    "MR MRS MS DR ST HMM SHH PSST BRR GRR TSK NTH CWM PFFT ZZZ MT FT".split()
)
_SHOUTED = 0.5

_REGNAL = (
    "Henry Louis Charles George Edward Elizabeth William James Richard Mary Pius Benedict Gregory "
    "Leo Innocent Clement Urban Alexander Nicholas Peter Catherine Frederick Philip Napoleon "
    "Ferdinand Francis Paul John Xavier Ramesses Rameses Ptolemy Constantine Haakon Olaf Christian "
    "Gustav Carl Wilhelm Ludwig Ivan Felipe Juan Carlos Otto Margaret Margrethe Cleopatra Darius "
    "Xerxes Mehmed Selim Murad Edmund Robert Malcolm Umberto Emmanuel Leopold Albert Baudouin"
).replace(" ", "|")
_REIGN = re.compile(
    rf"\b({_REGNAL})\s([IVX]{{2,6}}|[VX]|I(?=\s*(?:[.,;:!?)]|$|of\b|was\b|died\b|ruled\b)))\b"
)
_NUMBERED = (
    "Chapter|Part|Volume|Act|Scene|Book|Section|Article|Type|Phase|World War|Super Bowl|Episode|Title"
    "|Appendix|Class|Grade|Level|Stage|Figure|Table|Mark|Apollo|Rocky|Saturn|Final Fantasy|Schedule"
)
_NUMBERED_ROMAN = re.compile(rf"\b({_NUMBERED})\s([IVX]{{1,6}})\b(?!['’])")


def without_shortenings(text: str) -> str:
    """Abbreviations with a full stop, and Roman numerals after names, as words."""
    if "." in text:
        text = _WITH_NUMBER.sub(_numbered_word, text)
        text = _MERIDIEM.sub(_meridiem, text)
        text = _TITLE.sub(lambda match: f"{_TITLES[match[1]]} ", text)
        text = _NAME.sub(_full_name, text)
        text = _LONE_TITLE.sub(lambda match: _TITLES[match[1]] + _stop(match), text)
    text = _WORD.sub(_full_word, text)
    if "." in text:
        text = _LETTERS.sub(_spelt_letters, text)
        text = _INITIAL.sub(_initial, text)
    text = _VERSUS.sub("versus", text)
    text = _BARE_TITLE.sub(lambda match: _TITLES[match[1]], text)
    text = _NUMERO.sub("number ", text)
    text = _SECTION.sub("section ", text)
    text = _SAINT.sub(_saint_or_street, text)
    text = _REIGN.sub(_reign, text)
    return _NUMBERED_ROMAN.sub(_numbered_roman, text)


def without_acronyms(text: str) -> str:
    """Acronyms that are spelt, letter by letter: known ones, and those without a vowel."""
    text = _DEGREE.sub(lambda match: _DEGREES[match[0]], text)
    if _is_shouted(text):
        return text
    return _ACRONYM.sub(_acronym, text)


def _is_shouted(text: str) -> bool:
    capitals = sum(map(str.isupper, text))
    return capitals > _SHOUTED * (capitals + sum(map(str.islower, text))) and capitals > 12


def _acronym(match: re.Match[str]) -> str:
    letters, ending = match[1], match[2] or ""
    is_spelt = letters in _SPELT or not set(letters) & set("AEIOUY")
    if not is_spelt or letters in _SPOKEN_AS_WORDS or len(set(letters)) == 1:
        return match[0]
    if roman(letters) is not None and letters not in _SPELT:
        return match[0]
    return spelt(letters) + ("'s" if ending else "")


def _stop(match: re.Match[str]) -> str:
    """The full stop of an abbreviation, where a sentence ends too; empty elsewhere."""
    if not match[0].endswith("."):
        return ""
    following = match.string[match.end() : match.end() + 24]
    if not following.strip(" \"'”’)*_"):
        return "."
    words = following.split(maxsplit=1)
    if not following[0].isspace() or not words:
        return ""
    word = words[0].strip("\"'“‘(,.;:!?")
    return "." if word[:1].isupper() and word.casefold() in STARTERS else ""


def _numbered_word(match: re.Match[str]) -> str:
    key = match[1] if match[1] in _WITH_NUMBERS else match[1].capitalize()
    return f"{_WITH_NUMBERS.get(key, _WITH_NUMBERS.get(match[1].lower(), match[1]))} "


def _meridiem(match: re.Match[str]) -> str:
    return f"{spelt(match[1])} M{_stop(match)}"


def _full_name(match: re.Match[str]) -> str:
    return _NAMES[match[1]] + _stop(match)


def _full_word(match: re.Match[str]) -> str:
    words = _WORDS[match[1].lower()]
    if match[1][0].isupper():
        words = words[0].upper() + words[1:]
    following = match.string[match.end() : match.end() + 1]
    return words + _stop(match) + (" " if match[1].endswith("/") and following.isalnum() else "")


def _spelt_letters(match: re.Match[str]) -> str:
    letters = match[1].replace(".", "")
    following = match.string[match.end() : match.end() + 24].split(maxsplit=1)
    is_name = following and following[0][:1].isupper() and following[0].casefold() not in STARTERS
    if is_name and len(letters) < 4 and match[1] not in ("U.S.", "U.K.", "U.N.", "E.U."):
        return spelt(letters)  # initials
    return spelt(letters) + _stop(match)


def _initial(match: re.Match[str]) -> str:
    word = match.string[match.start(2) : match.start(2) + 24].split()[0].strip(".,;:!?'")
    return match[0] if len(word) > 1 and word.casefold() in STARTERS else match[1]


def _saint_or_street(match: re.Match[str]) -> str:
    before = match.string[max(0, match.start() - 24) : match.start()].split()
    following = match.string[match.end() : match.end() + 24].split()
    name = following[0].strip(".,;:!?") if following else ""
    is_name = name[:1].isupper() and name.casefold() not in STARTERS
    follows_name = bool(before) and before[-1][:1].isupper() and before[-1][-1].isalnum()
    follows_name = follows_name and before[-1].casefold() not in STARTERS
    follows_ordinal = bool(before) and re.fullmatch("[0-9]+(?:st|nd|rd|th)", before[-1]) is not None
    if is_name and not follows_ordinal and not (follows_name and not match[0].endswith(".")):
        return "Saint"
    if follows_name or follows_ordinal:
        return "Street" + _stop(match)
    return match[0]


def _reign(match: re.Match[str]) -> str:
    number = roman(match[2])
    return f"{match[1]} the {ordinal(number)}" if number else match[0]


def _numbered_roman(match: re.Match[str]) -> str:
    number = roman(match[2])
    return f"{match[1]} {cardinal(number)}" if number else match[0]
