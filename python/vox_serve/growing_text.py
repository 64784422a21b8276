"""A text that arrives in fragments, and the sentences of it that no later fragment can change."""

from collections.abc import Iterator

from vox_serve.text.splitting import Part, SentenceStream

PIECE_CHARS = 256
"""Characters that take a few milliseconds at most."""


class GrowingText:
    """Takes the fragments of one text, as a language model writes them.

    The sentences are those that `splitting.split` makes of the whole text, however it is cut into
    fragments. Time is linear in the text, and memory bounded by a few times the longest sentence:
    what was given out is forgotten.

    Args:
        max_chars: longest text.
        max_part_chars: longest sentence; a longer one is cut, as by `split`.
        preferred_chars: short sentences are packed into one part up to this length; 0 gives each
            sentence out as soon as it is complete.

    Attributes:
        num_chars: length of the text so far.
    """

    def __init__(self, max_chars: int, max_part_chars: int, preferred_chars: int = 0) -> None:
        self.num_chars = 0
        self._max_chars = max_chars
        self._stream = SentenceStream(max_part_chars, preferred_chars)
        self._half = ""  # the first half of a surrogate pair

    def add(self, fragment: str) -> list[Part]:
        """Take the next fragment; return the sentences that are complete now.

        A sentence is complete once the next one has begun, since until then it might go on: mostly
        with the space and the first character after its full stop, after an abbreviation a few
        words later. A blank line completes it at once.

        Raises:
            ValueError: the text is too long with it, or it has half a surrogate pair whose other
                half is missing. The fragment is then left out.
        """
        return self._stream.feed(self._joined(fragment))

    def pieces(self, fragment: str) -> Iterator[list[Part]]:
        """Like `add`, in steps of at most `PIECE_CHARS`. The text is taken with the first one."""
        whole = self._joined(fragment)
        for start in range(0, len(whole), PIECE_CHARS):
            yield self._stream.feed(whole[start : start + PIECE_CHARS])

    def _joined(self, fragment: str) -> str:
        """The next fragment with its surrogate pairs joined; counts its characters."""
        half, self._half = self._half, ""
        whole = half + fragment
        if half or not fragment.isascii():
            whole, self._half = _joined_pairs(whole)
        if self.num_chars + len(whole) > self._max_chars:
            self._half = half
            raise ValueError(f"the text of a turn must have at most {self._max_chars} characters")
        self.num_chars += len(whole)
        return whole

    def flush(self) -> list[Part]:
        """Take everything so far for complete; the text may go on after that."""
        self._half = ""
        return self._stream.end()


def _joined_pairs(text: str) -> tuple[str, str]:
    """A text with its surrogate pairs joined, and the half of one at its end.

    JavaScript's strings are UTF-16, so a fragment may end within a character.
    """
    half = ""
    if "\ud800" <= text[-1:] <= "\udbff":
        text, half = text[:-1], text[-1]
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16"), half
    except UnicodeDecodeError:
        raise ValueError("text has half a surrogate pair") from None
