"""The bound on a text's length, checked before anything else touches the text."""


def check_length(text: str, max_chars: int) -> None:
    """Raise a ValueError if a text has more than `max_chars` characters."""
    if len(text) > max_chars:
        raise ValueError(f"text must have at most {max_chars} characters, got {len(text)}")
