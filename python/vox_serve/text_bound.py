"""The bound on a text's length, checked before anything else touches the text; and the bound on the
length of its speech."""

POSITIONS_PER_SPOKEN_CHAR = 2.5
"""Positions of the model's context that a text and its speech take: a token at most, and 1.5 frames
of slow speech, 8 characters a second."""

POSITIONS_PER_CHAR = 4
"""A text as long as the model's context divided by this leaves room for speech and context."""

_BASE_FRAMES = 63
_FRAMES_PER_LETTER = 5
_FRAMES_PER_SYMBOL = 15
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz ,.;:!?'\"-()\n\t")


def check_length(text: str, max_chars: int) -> None:
    """Raise a ValueError if a text has more than `max_chars` characters."""
    if len(text) > max_chars:
        raise ValueError(f"text must have at most {max_chars} characters, got {len(text)}")


def most_part_chars(split_chars: int, max_positions: int, max_part_chars: int | None = None) -> int:
    """The longest part of a text.

    Args:
        split_chars: the setting; 0 if texts are not split.
        max_positions: of the model's context.
        max_part_chars: the longest text that the model speaks well; None if that is not known.
    """
    limit = max_positions // POSITIONS_PER_CHAR
    return min(split_chars or limit, max_part_chars or limit, limit)


def frames_bound(text: str) -> int:
    """Frames of 80 ms that only speech without an end exceeds.

    Slow speech has 8 letters a second, and each gets three times that: 0.4 s, or 5 frames. Digits,
    capitals and signs may be words of their own, and letters of other scripts syllables: 1.2 s
    each. 5 s are added for pauses, which weigh most in short texts.
    """
    letters = sum(character in _LETTERS for character in text)
    symbols = len(text) - letters
    return _BASE_FRAMES + _FRAMES_PER_LETTER * letters + _FRAMES_PER_SYMBOL * symbols


def frames_expected(text: str) -> int:
    """About as many frames as it takes to speak a text: 1 s, and 12 letters a second."""
    return frames_bound(text) // _FRAMES_PER_LETTER
