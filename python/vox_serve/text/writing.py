# ruff: noqa: RUF001 - quotation marks and dashes
"""Takes out of a text what was written for a screen: markup, line ends, addresses, emoji."""

import re
import unicodedata

from vox_serve.text import numbers
from vox_serve.text.splitting import WRAPPED_LINE_CHARS

_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060-\u2064\ufeff\ufe0e\x00-\x08\x0e-\x1f\x7f]")
_WIDE_DIGITS = {0xFF10 + i: 0x30 + i for i in range(10)}
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "#39": "'", "apos": "'", "nbsp": " "}
_ENTITY = re.compile("&(amp|lt|gt|quot|#39|apos|nbsp);")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,300}>|<!--[^<>]{0,1000}-->")
_LINK = re.compile(
    r"!?\[([^\[\]\n]{1,500})\](?:\([^()\s]{0,2000}(?: \"[^\"\n]{0,200}\")?\)|\[[^\[\]\n]{0,100}\])"
)
_NOTE = re.compile(r"\[\^?([0-9]{1,3}(?:[,–-] ?[0-9]{1,3}){0,5})\]")
_EMPHASIS = re.compile(
    r"\*\*+|~~+|`+|(?<![\s*0-9])\*|\*(?![\s*0-9])|(?<![^\W_])_+|_+(?![^\W_])|(?m:^)\*(?=[0-9])"
)

_LINE_BREAK = re.compile("\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")
_RULE = re.compile(r"\s*(?:[-*_=]\s?){3,}|\s*\|?(?:\s?:?-{2,}:?\s?\|)+(?:\s?:?-{2,}:?)?\s*")
_FENCE = re.compile(r"\s*(?:```|~~~)\s*[\w+-]*\s*")
_ITEM = re.compile(r"\s*(?:>\s?)*(?:(?:[-*+•‣◦▪–—]|#{1,6})(?=\s)|\(?([0-9]{1,2})[.)](?=\s))?\s*")
_CLOSING = "\"'’”»)]*_`"

_TOP_LEVELS = (
    "com|org|net|edu|gov|mil|int|info|biz|io|ai|app|dev|me|tv|co|us|uk|eu|de|fr|es|it|nl|ch|at|be|se|no"
    "|dk|fi|pl|ru|cn|jp|in|br|ca|au|nz|ie|xyz|online|site|shop|blog|tech|cloud"
)
_WEB = re.compile(
    r"(?<![\w@.])(?:(?:https?|ftp)://(?:www\.)?|www\.)([^\s<>\"'“”‘’(){}\[\]|]{1,2000})"
    rf"|(?<![\w@./-])((?:[a-z0-9][a-z0-9-]{{0,62}}\.){{1,5}}(?:{_TOP_LEVELS})"
    r"(?![\w@-]|\.[A-Za-z0-9])(?:[/?#][^\s<>\"'“”‘’(){}\[\]|]{0,2000})?)",
)
_MAIL = re.compile(
    r"(?<![\w.+-])(?:mailto:)?([A-Za-z0-9_.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24})"
    r"(?![\w-])"
)
_HANDLE = re.compile(r"(?<![\w@.])@(?=[A-Za-z])")
_HASHTAG = re.compile(r"(?<![\w#&])#(?=[A-Za-z][\w-]{0,100})")
_FILE = re.compile(
    r"(?<=[A-Za-z0-9])\.((?:py|js|ts|txt|pdf|docx?|xlsx?|pptx?|csv|json|xml|html?|css|md|zip|exe|jpe?g"
    r"|png|gif|svg|mp[34]|wav|ya?ml|toml|sh|cpp|rs|net)\b(?!\.?\w))"
)
_ADDRESS_PART = re.compile("[A-Za-z]+|[0-9]+|.", re.DOTALL)
_ADDRESS_SIGNS = {
    ".": "dot",
    "/": "slash",
    "-": "dash",
    "_": "underscore",
    "?": "question mark",
    "=": "equals",
    "&": "and",
    "#": "hash",
    "@": "at",
    ":": "colon",
    "%": "percent",
    "+": "plus",
    "~": "tilde",
}
_LONG_ADDRESS_CHARS = 80
"""A longer address is spoken without what follows its host."""

_EMOJI_CHARACTER = "[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u231a-\u23ff\u20e3]"
_EMOJI = re.compile(rf"(?:{_EMOJI_CHARACTER}[\ufe0f\u200d\U000e0020-\U000e007f]*)+|\ufe0f")
_EMOTICON = re.compile(r"(?<!\S)(?:[:;=8]['’]?-?[)(DPp/|\]\[]|<3+|[xX]D|\^_?\^)(?=[\s.,!?]|$)")


def spelt(letters: str) -> str:
    """Letter by letter. "A" is written "ay", since alone it is the article."""
    return " ".join("ay" if letter in "aA" else letter.upper() for letter in letters)


def spoken_group(letters: str) -> str:
    """A group of letters of a name or an address: spelt if it cannot be a word."""
    if len(letters) == 1 or (len(letters) < 6 and not re.search("[aeiouyAEIOUY]", letters)):
        return spelt(letters)
    return letters


def without_invisible(text: str) -> str:
    return _INVISIBLE.sub("", text).translate(_WIDE_DIGITS)


def without_markup(text: str) -> str:
    """Words of HTML and Markdown. A number in brackets is a label at the start of a line; right
    after a word it is a note, which is not spoken."""
    text = _TAG.sub(" ", _ENTITY.sub(lambda match: _ENTITIES[match[1]], text))
    text = _LINK.sub(r"\1", text)

    def note(match: re.Match[str]) -> str:
        before = text[max(0, match.start() - 8) : match.start()]
        if not before.strip(" ") or before.rstrip(" ")[-1:] in "\n\r":
            return f"{match[1]}, "
        is_note = before[-1].isalnum() or before[-1] in ".,;:!?\"'”’)]"
        return "" if is_note else match[1]

    text = _NOTE.sub(note, text)
    return text.replace("[", "").replace("]", "") if "[" in text or "]" in text else text


def without_emphasis(text: str) -> str:
    return _EMPHASIS.sub("", text)


def on_one_line(text: str) -> str:
    """Lines joined by pauses, but for lines that were wrapped; marks of lists and headings go."""
    if not _LINE_BREAK.search(text) and not _ITEM.match(text)[0].strip():  # type: ignore[index]
        return text
    joined: list[str] = []
    last, was_heading, was_row, is_blank = "", False, False, False
    for line in _LINE_BREAK.split(text):
        if not line.strip() or _RULE.fullmatch(line) or _FENCE.fullmatch(line):
            is_blank = True
            continue
        match = _ITEM.match(line)
        assert match is not None  # it matches the empty text
        mark = match[0].strip()
        line = (f"{match[1]}, " if match[1] else "") + line[match.end() :].rstrip()
        is_row = line.startswith("|") and line.endswith("|")
        if is_row or " | " in line:
            line = ", ".join(cell.strip() for cell in line.split("|") if cell.strip())
        if not line.strip():
            continue
        if joined:
            ends = bool(mark) or was_heading or is_row or was_row or is_blank
            joined.append(_joint(last, line, ends))
        joined.append(line)
        last, was_heading, was_row, is_blank = line, mark.startswith("#"), is_row, False
    return "".join(joined)


def _joint(last: str, line: str, ends: bool) -> str:
    """The text between two lines; `ends` says that the first ends a paragraph, an item, ..."""
    end = last.rstrip(_CLOSING + " ")[-1:]
    is_lower = line.lstrip(_CLOSING + "“‘(")[:1].islower()
    if end in ".!?…。！？,;:—–-":
        return "" if end == "-" and is_lower and not ends else " "
    if ends:
        return ". "
    if len(last) >= WRAPPED_LINE_CHARS:
        return " "
    return ", " if is_lower else ". "


def without_addresses(text: str) -> str:
    """URLs, e-mail addresses, handles, hashtags and file names as words."""
    if "@" in text:
        text = _MAIL.sub(lambda match: _spoken_address(match[1]), text)
        text = _HANDLE.sub("at ", text)
    if "." in text:
        text = _WEB.sub(_spoken_url, text)
        text = _FILE.sub(lambda match: f" dot {spoken_group(match[1])}", text)
    return _HASHTAG.sub("hashtag ", text) if "#" in text else text


def _spoken_url(match: re.Match[str]) -> str:
    address = match[1] or match[2]
    kept = address.rstrip(".,;:!?…*_~")
    end = address[len(kept) :]
    host = re.split("[/?#]", kept)[0]
    if len(kept) > _LONG_ADDRESS_CHARS:
        kept = host[:_LONG_ADDRESS_CHARS]
    return _spoken_address(kept.rstrip("/")) + end


def _spoken_address(address: str) -> str:
    words = []
    parts = _ADDRESS_PART.findall(address)
    for i, part in enumerate(parts):
        if part in _ADDRESS_SIGNS:
            words.append(_ADDRESS_SIGNS[part])
        elif part[0].isascii() and part[0].isalpha():
            is_country = len(part) == 2 and i and parts[i - 1] == "." and part not in ("me", "co")
            words.append(spelt(part) if is_country else spoken_group(part))
        elif part[0] in "0123456789":
            words.append(numbers.numeral(part) if len(part) < 3 else numbers.digits(part))
        else:
            words.append(part)
    return " ".join(words)


def without_emoji(text: str) -> str:
    if text.isascii():
        return _EMOTICON.sub("", text)
    return _EMOTICON.sub("", _EMOJI.sub(" ", text))


def emoji_names(text: str) -> str:
    """The names of the emoji in a text that has nothing else to say."""
    names = (unicodedata.name(character, "") for character in text[:20] if ord(character) > 0x2000)
    return ", ".join(name.lower() for name in names if name and "SELECTOR" not in name).replace(
        "-", " "
    )
