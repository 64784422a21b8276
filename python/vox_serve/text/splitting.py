# ruff: noqa: RUF001 - punctuation of other scripts
"""Splits a long text into parts that are spoken one after another, whole or as it arrives.

A part is one sentence or a few short ones. The scan looks at each gap between two words once, with
at most 48 characters after the gap, so time is linear in any text, and what has been emitted never
depends on text that comes later: that is what `SentenceStream` promises. The rules suit English
best; CJK and other scripts are split at their own full stops.
"""

import re
import unicodedata
from typing import Self

from vox_serve.text.abbreviations import BEFORE_NAMES, BEFORE_NUMBERS, IN_SENTENCES, STARTERS

PREFERRED_CHARS = 200
"""Preferred length of a part: about 13 s of speech."""

_AHEAD_CHARS = 48
_CLOSING = "\"'’”»›)]}*_~`」』）】》〉］"
_OPENING = "\"'‘“«‹([{*_~`¿¡「『（【《〈［„‚"
_ENDS = ".!?…‼⁇⁈⁉؟۔।॥։።፧។៕။"
_WIDE_ENDS = "。！？｡．"
_LINE_BREAKS = "\n\r\x0b\x0c\x85\u2028\u2029"

_GAP = re.compile(
    rf"\s\s+|[{_LINE_BREAKS}]|(?<=[{re.escape(_CLOSING + _ENDS)}])\s"
    rf"|[{_WIDE_ENDS}]{{1,16}}[{re.escape(_CLOSING)}]{{0,16}}"
)
"""A gap in which a sentence may end. A single space after a letter is none."""

_SPACE = re.compile(r"\s*")
_BULLET = re.compile(r"(?:[-*+•‣◦–—>]|#{1,6}|\(?(?:\d{1,3}|[A-Za-z])[.)])(\s)")
_ENUMERATOR = re.compile(r"\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,5})[.)]")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_SAID = re.compile(
    r"[^\W\d_]+\s+(?:said|says|asked|asks|cried|replied|answered|shouted|whispered|yelled|called"
    r"|exclaimed|muttered|screamed|added|laughed)\b"
)
WRAPPED_LINE_CHARS = 45
"""A line this long ends because it was wrapped, a shorter one because its writer ended it."""

_CLAUSE_ENDS = (
    (re.compile(rf"[{_ENDS}][{re.escape(_CLOSING)}]?(?=\s)|[{_WIDE_ENDS}][{_CLOSING[-12:]}]?"), 2),
    (re.compile(r"[;:—–)\]](?=\s)|[；：—]"), 2),
    (re.compile(r",[\"'’”]?(?=\s)|[，、،]"), 3),
)
"""Where a sentence that is too long is cut, best first: pattern, and the smallest piece as a
fraction of the longest."""


class Part(str):
    """A part of a text, without white space at its ends; wrapped lines are joined.

    Attributes:
        ends_paragraph: a blank line, or the end of the text, follows: speech pauses here.
        start: index of its first character in everything that was fed.
        end: index after its last one.
    """

    __slots__ = ("end", "ends_paragraph", "start")
    ends_paragraph: bool
    start: int
    end: int

    def __new__(cls, text: str, ends_paragraph: bool, start: int, end: int) -> Self:
        part = super().__new__(cls, text)
        part.ends_paragraph, part.start, part.end = ends_paragraph, start, end
        return part


def split(text: str, max_chars: int, preferred_chars: int = PREFERRED_CHARS) -> list[Part]:
    """Split a text into parts at sentence ends. Joined again they lose only white space.

    Args:
        text: any text; a blank one has no parts.
        max_chars: longest part, 1 or more. A longer sentence is cut where a clause ends, else
            between words, else between characters as a reader sees them.
        preferred_chars: sentences are packed into one part up to this length, and a very short one
            beyond it; a blank line always ends a part. 0 makes each sentence a part.
    """
    stream = SentenceStream(max_chars, preferred_chars)
    return stream.feed(text) + stream.end()


class SentenceStream:
    """Splits a text that arrives in fragments, into the parts that `split` makes of the whole.

    A part is emitted as soon as no further text can change it. Memory is bounded by a few times
    `max_chars` and the fragment.

    Args:
        max_chars: see `split`.
        preferred_chars: see `split`; 0 emits each sentence once the next one begins.
    """

    def __init__(self, max_chars: int, preferred_chars: int = 0) -> None:
        if max_chars < 1:
            raise ValueError(f"max_chars must be 1 or more, got {max_chars}")
        if preferred_chars < 0:
            raise ValueError(f"preferred_chars must be 0 or more, got {preferred_chars}")
        self._max_chars = max_chars
        self._preferred_chars = min(preferred_chars, max_chars)
        self._text = ""
        self._num_forgotten = 0  # characters before `_text`
        self._parts: list[Part] = []
        self._part_start = 0  # of the part that is being packed
        self._part_end = 0  # end of its last sentence; equal to its start if it has none
        self._sentence = 0  # start of the current sentence
        self._scan = 0  # gaps before it have been judged
        self._line = 0  # start of the current line
        self._wraps: list[int] = []  # ends of wrapped lines in the part and the sentence

    def feed(self, fragment: str) -> list[Part]:
        """Take the next fragment; return the parts that it completes."""
        self._text += fragment
        return self._advance(is_final=False)

    def end(self) -> list[Part]:
        """Return the remaining parts. The stream can then take another text."""
        return self._advance(is_final=True)

    def _advance(self, is_final: bool) -> list[Part]:
        while self._step(is_final):
            pass
        if is_final:
            self._close_part(ends_paragraph=True)
            self._sentence = self._part_start = self._part_end = len(self._text)
        self._forget(self._part_start if self._has_part else self._sentence)
        parts, self._parts = self._parts, []
        if is_final:
            self._line = 0
        return parts

    def _forget(self, count: int) -> None:
        """Drop the first characters of the text; all positions move."""
        self._text = self._text[count:]
        self._num_forgotten += count
        self._sentence -= count
        self._scan = max(0, self._scan - count)
        self._line -= count
        self._wraps = [position - count for position in self._wraps if position >= count]
        self._part_end = max(0, self._part_end - count)
        self._part_start = max(0, self._part_start - count)

    @property
    def _has_part(self) -> bool:
        return self._part_end > self._part_start

    def _step(self, is_final: bool) -> bool:
        """Judge the next gap; False if that needs more text."""
        text = self._text
        if self._scan <= self._sentence:  # leading white space
            start = _SPACE.match(text, self._sentence).end()  # type: ignore[union-attr]
            self._see_lines(self._sentence, start)
            self._sentence = self._scan = start
            if start == len(text):
                return False
        limit = self._sentence + self._max_chars
        # Two characters beyond the limit show a gap at the limit.
        gap = _GAP.search(text, self._scan, limit + 2)
        if gap is not None and gap.start() <= limit:
            return self._judge(gap, limit, is_final)
        end = len(text)
        if text[end - 1].isspace():  # a gap whose end has not come
            end -= 1
        if end > limit + 1 or (is_final and end > limit):
            self._end_sentence(self._cut(limit), ends_paragraph=False)
            return True
        self._scan = min(end, limit)
        if is_final:
            self._end_sentence(end, ends_paragraph=True)
        return False

    def _judge(self, gap: re.Match[str], limit: int, is_final: bool) -> bool:
        text, start = self._text, gap.start()
        self._scan = start
        if not gap[0].isspace():
            return self._judge_wide_end(gap.end(), limit, is_final)
        end = _SPACE.match(text, start, start + self._max_chars + 1).end()  # type: ignore[union-attr]
        space = text[start:end]
        num_breaks = _count_line_breaks(space)
        is_blank_line = num_breaks >= 2
        if is_blank_line or end - start > self._max_chars:
            self._end_sentence(start, ends_paragraph=is_blank_line)
            return True
        if end == len(text):
            if is_final:
                self._end_sentence(start, ends_paragraph=True)
            return is_final
        ahead = text[end : end + _AHEAD_CHARS]
        is_whole = is_final or len(ahead) == _AHEAD_CHARS
        line_length = start - self._line if num_breaks else None
        before = text[max(self._sentence, start - _AHEAD_CHARS) : start]
        verdict = _ends_sentence(before, start - self._sentence, line_length, ahead, is_whole)
        if verdict is None:
            return False
        if verdict:
            self._end_sentence(start, ends_paragraph=False)
        else:
            if line_length is not None and line_length >= WRAPPED_LINE_CHARS:
                self._wraps.append(start)
            self._see_lines(start, end)
            self._scan = end
        return True

    def _judge_wide_end(self, end: int, limit: int, is_final: bool) -> bool:
        """Judge a full stop that needs no space after it. After a closing quote a sentence goes on:
        "he said"."""
        if end > limit:
            self._end_sentence(self._cut(limit), ends_paragraph=False)
            return True
        if end == len(self._text) and not is_final:
            return False
        following = self._text[end : end + 1]  # empty at the end of the text
        is_quote = self._text[end - 1] in _CLOSING
        self._scan = end
        goes_on = following.isspace() or following in _CLOSING + _ENDS + _WIDE_ENDS
        if not goes_on and (not is_quote or following in _OPENING):
            self._end_sentence(end, ends_paragraph=False)
        return True

    def _see_lines(self, start: int, end: int) -> None:
        for position in range(end, start, -1):
            if self._text[position - 1] in _LINE_BREAKS:
                self._line = position
                return

    def _end_sentence(self, end: int, ends_paragraph: bool) -> None:
        """Add the current sentence to the part; close the part if it does not fit, or is full."""
        if self._has_part and not self._fits(end):
            self._close_part(ends_paragraph=False)
        if not self._has_part:
            self._part_start = self._sentence
        self._part_end = self._sentence = self._scan = end
        if ends_paragraph or not self._preferred_chars:
            self._close_part(ends_paragraph)

    def _fits(self, end: int) -> bool:
        length, preferred = end - self._part_start, self._preferred_chars
        shortest = min(self._part_end - self._part_start, end - self._sentence)
        if shortest < preferred // 6:  # models speak very short texts badly
            preferred += preferred // 4
        return length <= min(preferred, self._max_chars)

    def _close_part(self, ends_paragraph: bool) -> None:
        if self._has_part:
            span = (self._num_forgotten + at for at in (self._part_start, self._part_end))
            self._parts.append(Part(self._unwrapped(), ends_paragraph, *span))
        self._part_start = self._part_end

    def _unwrapped(self) -> str:
        """The text of the part, with a space at the ends of wrapped lines."""
        start, end = self._part_start, self._part_end
        inside = [position for position in self._wraps if position < end]
        self._wraps = self._wraps[len(inside) :]
        pieces = []
        for position in inside:
            if position > start:
                pieces.append(self._text[start:position] + " ")
                start = _SPACE.match(self._text, position).end()  # type: ignore[union-attr]
        return "".join(pieces) + self._text[start:end]

    def _cut(self, limit: int) -> int:
        """Where to cut a sentence that goes on beyond `limit`."""
        text, start = self._text, self._sentence
        # The character at the limit may be the space after a clause.
        window = text[start : limit + 1]
        for pattern, fraction in _CLAUSE_ENDS:
            ends = [match.end() for match in pattern.finditer(window)]
            ends = [end for end in ends if self._max_chars // fraction <= end <= self._max_chars]
            if ends and ends[-1] and not _joins(text, start + ends[-1]):
                return start + ends[-1]
        for end in range(self._max_chars, 0, -1):
            if window[end].isspace() and not window[end - 1].isspace():
                return start + end
        for end in range(limit, max(start, limit - _AHEAD_CHARS), -1):
            if not _joins(text, end):
                return end
        return limit


def _count_line_breaks(space: str) -> int:
    """Line breaks in white space; a page's or a paragraph's end counts twice."""
    if len(space) == 1 and space in " \n":
        return int(space == "\n")
    breaks = sum(space.count(c) for c in _LINE_BREAKS) - space.count("\r\n")
    return breaks + space.count("\x0c") + space.count("\u2029")


def _joins(text: str, end: int) -> bool:
    """True if the characters before and after a position are one to a reader."""
    last, following = text[end - 1], text[end : end + 1]
    if not following:
        return False
    if unicodedata.category(following)[0] == "M" or following in "\u200c\u200d":
        return True
    code = ord(following)
    if 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F or 0x1160 <= code <= 0x11FF:
        return True  # skin tones, tags of flags, Hangul vowels and finals
    if last == "\u200d" or last + following == "\r\n":
        return True
    if not _is_regional(following):
        return False
    before = end  # regional indicators form flags in pairs
    while before > max(0, end - _AHEAD_CHARS) and _is_regional(text[before - 1]):
        before -= 1
    return (end - before) % 2 == 1


def _is_regional(character: str) -> bool:
    return 0x1F1E6 <= ord(character) <= 0x1F1FF


def _ends_sentence(
    before: str, length: int, line_length: int | None, ahead: str, is_whole: bool
) -> bool | None:
    """Judge a gap without a blank line.

    Args:
        before: the end of the sentence so far.
        length: the length of the sentence so far.
        line_length: of the line that ends in this gap; None if none does.
        ahead: text after the gap, not empty.
        is_whole: no further text could change the verdict.

    Returns:
        True if a sentence ends here; None if `ahead` is too short to tell.
    """
    if line_length is not None:
        verdict = _ends_at_line(before, line_length, ahead, is_whole)
        if verdict is not False:
            return verdict
    core = before.rstrip(_CLOSING + " \t\n")
    if not core or core[-1] not in _ENDS:
        return False
    is_closed = before[-1] in _CLOSING
    opened = ahead.lstrip(_OPENING)
    if not opened:
        return True if is_whole else None
    first = opened[0]
    if first.isspace():
        return ahead[0] not in _CLOSING or ahead[0] in "\"'"
    if first in _ENDS or first in _CLOSING or first in "-–—,;:":
        return False
    mark = core[-1]
    if mark != ".":
        return _ends_at_mark(mark, is_closed, opened, is_whole)
    if first.islower():
        return False
    word = re.split(r"[\s(\[{\"'“‘/-]", core)[-1]
    if length == len(before) and before == word and _ENUMERATOR.fullmatch(before):
        return False
    if core.endswith(".."):
        return _begins_with_other_than_i(opened, is_whole)
    name = word[:-1].casefold()
    if name in BEFORE_NUMBERS and first.isdigit():
        return False
    if name in ("no", "art"):
        return True
    if name in BEFORE_NAMES:
        return False
    if name in BEFORE_NUMBERS or name in IN_SENTENCES or _DOTTED.fullmatch(word):
        return _begins_with_starter(opened, is_whole)
    return True


def _ends_at_line(before: str, line_length: int, ahead: str, is_whole: bool) -> bool | None:
    """True if the end of a line ends a sentence: a list's items, headings, verses."""
    if _BULLET.match(ahead):
        return True
    if len(ahead) < 8 and not any(c.isspace() for c in ahead) and not is_whole:
        return None  # it may become a bullet
    if line_length >= WRAPPED_LINE_CHARS or before[-1] in ",;-–—(，、；":
        return False
    first = ahead.lstrip(_OPENING)[:1]
    if not first and not is_whole:
        return None
    return first.isalnum() and not first.islower()


def _ends_at_mark(mark: str, is_closed: bool, opened: str, is_whole: bool) -> bool | None:
    """The verdict after "!", "?", "…" and the full stops of other scripts."""
    if mark == "…":
        return False if opened[0].islower() else _begins_with_other_than_i(opened, is_whole)
    if not is_closed:
        return True
    if opened[0].islower():
        return False
    if opened[0].isupper():  # "Stop!" John said.
        if not is_whole and len(opened.split(maxsplit=2)) < 3:
            return None
        return _SAID.match(opened) is None
    return True


def _begins_with_starter(opened: str, is_whole: bool) -> bool | None:
    match = _WORD.match(opened)
    if match is None:
        return False
    if match.end() >= len(opened) - 1 and not is_whole:
        return None
    if opened[match.end() : match.end() + 1] == "." and len(match[0]) == 1:
        return False  # an initial
    return re.split("['’]", match[0])[0].casefold() in STARTERS


def _begins_with_other_than_i(opened: str, is_whole: bool) -> bool | None:
    """Most sentences pause at an ellipsis before "I" and go on."""
    match = _WORD.match(opened)
    if match and match.end() >= len(opened) - 1 and len(match[0]) < 5 and not is_whole:
        return None
    return match is None or re.split("['’]", match[0])[0] != "I"
