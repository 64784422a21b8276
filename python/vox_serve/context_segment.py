"""The fields of a context segment, checked alike in a context.json and in a request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vox_serve.json_file import shown
from vox_serve.text_bound import check_length

CODE_BYTES = 8
"""Memory of a code in a list."""


class ContextError(ValueError):
    """An invalid context; the message names the file or request field, the entry and its field."""


class Place(NamedTuple):
    """An entry's place as messages begin: `entry` before a reason, `field` before a field's name.

    For a file "a.json, entry 3: " twice; for a request "context[3]: " and "context[3].".
    """

    entry: str
    field: str


@dataclass(frozen=True)
class SegmentFields:
    """A segment whose speech is not read yet.

    Attributes:
        speaker: 0 to 2^31 - 1.
        text: not blank, and valid Unicode.
        kind: which field gives the speech.
        speech: that field's value, unchecked.
    """

    speaker: int
    text: str
    kind: Literal["audio", "codes"]
    speech: Any


def speech_bytes(segments: Sequence[SegmentFields]) -> int:
    """Memory that the unchecked speech of segments takes, about."""

    def count(fields: SegmentFields) -> int:
        if isinstance(fields.speech, str | bytes):
            return len(fields.speech)
        return CODE_BYTES * sum(len(row) for row in fields.speech if isinstance(row, list))

    return sum(map(count, segments))


def check_segment(entry: Any, place: Place, max_text_chars: int | None = None) -> SegmentFields:
    """Check an entry of a context, all but the value of `audio` or `codes`.

    Args:
        entry: parsed JSON: an object with `speaker`, `text`, and `audio` or `codes`.
        place: begins the messages.
        max_text_chars: longest text; None for no bound.

    Raises:
        ContextError: a field is missing, unknown or invalid.
    """
    if not isinstance(entry, Mapping):
        raise ContextError(f"{place.entry}must be an object with speaker, text, and audio or codes")
    if unknown := sorted(set(entry) - {"speaker", "text", "audio", "codes"}):
        raise ContextError(f"{place.field}{unknown[0][:100]} is no field of a segment")
    speaker, text = entry.get("speaker"), entry.get("text")
    if isinstance(speaker, bool) or not isinstance(speaker, int) or not 0 <= speaker < 2**31:
        raise ContextError(
            f"{place.field}speaker must be a whole number from 0, got {shown(speaker)}"
        )
    if not isinstance(text, str) or not text.strip():
        raise ContextError(
            f"{place.field}text must be a string that is not blank, got {shown(text)}"
        )
    try:
        if max_text_chars is not None:
            check_length(text, max_text_chars)
        text.encode()
    except UnicodeEncodeError:
        raise ContextError(f"{place.field}text must be valid Unicode") from None
    except ValueError as error:
        raise ContextError(f"{place.field}{error}") from None
    if ("audio" in entry) == ("codes" in entry):
        raise ContextError(f"{place.entry}give either audio or codes")
    kind: Literal["audio", "codes"] = "audio" if "audio" in entry else "codes"
    return SegmentFields(speaker, text, kind, entry[kind])
