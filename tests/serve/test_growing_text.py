# ruff: noqa: RUF001 - punctuation of other scripts
"""Sentences of a text that grows are those of the whole, whatever its fragments are."""

import random
from itertools import chain

import pytest

from vox_serve.growing_text import GrowingText
from vox_serve.text.splitting import split

TEXTS = [
    "Dr. Smith paid $3.50 for it. He was glad... I think. Was he?",
    'She said "Go away." Then she left. (See e.g. https://a.example/b.c?d=e. for more.) Bye!',
    "1. First item\n2. Second item\n\nA note.[1] It ends [2] here. Mr. J. R. R. Tolkien came.",
    "你好。我是人。「什么？」他说。そうです。はい！",
    "A 👩\u200d👩\u200d👧 came. e\u0301a is fine. 🇩🇪🇫🇷 won! 😀 Yes.",
    "It is 3. 5 came. It was 3.5 in. of rain at 5 p.m. on Jan. 5. Ok.",
    "Wait… what?! No. Well—yes; it was, etc. That is all",
    "word " * 60,
]


def fragments(text: str, source: random.Random) -> list[str]:
    """A text in fragments of UTF-16 units, as JavaScript would cut it."""
    units = text.encode("utf-16-le", "surrogatepass")
    found = []
    while units:
        size = 2 * source.choice([1, 1, 2, 3, 7, 40])
        found.append(units[:size].decode("utf-16-le", "surrogatepass"))
        units = units[size:]
    return found


@pytest.mark.parametrize("preferred_chars", [0, 40])
def test_any_fragments_give_the_sentences_of_the_whole(preferred_chars):
    source = random.Random(18)
    for _ in range(150):
        text = source.choice(["", " ", "\n"]).join(source.sample(TEXTS, source.randrange(1, 4)))
        expected = split(text, 60, preferred_chars)
        growing = GrowingText(10_000, 60, preferred_chars)
        pieces = fragments(text, source) if source.random() < 0.7 else [text]
        if source.random() < 0.5:
            found = [part for piece in pieces for part in growing.add(piece)]
        else:
            found = [part for piece in pieces for part in chain(*growing.pieces(piece))]
        found += growing.flush()
        assert found == expected
        assert [(p.start, p.end) for p in found] == [(p.start, p.end) for p in expected]
        assert growing.num_chars == len(text)


def completed(text: str) -> dict[int, list[str]]:
    """The sentences by the number of characters that completed them."""
    growing = GrowingText(1000, 400)
    found = {n: growing.add(character) for n, character in enumerate(text, start=1)}
    return {n: parts for n, parts in found.items() if parts}


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("It is so. Yes", "It is so. Y"),
        ("It is so.\n\nYes", "It is so.\n\n"),
        ("Is it? No", "Is it? N"),
        ("It costs 3.5 now. Yes", "It costs 3.5 now. Y"),
        ('He said "no." Then', 'He said "no." T'),
        ("是的。好", "是的。好"),
    ],
)
def test_a_sentence_is_complete_once_the_next_one_begins(text, after):
    assert list(completed(text)) == [len(after)]


@pytest.mark.parametrize("text", ["Dr. Smith is in", "e.g. Apples", "3. 5 apples", "Hm... I think"])
def test_what_might_go_on_is_kept_back(text):
    assert completed(text) == {}


def test_a_flush_gives_out_what_is_there_and_the_text_goes_on():
    growing = GrowingText(1000, 400)
    assert growing.add("One moment") == []
    (part,) = growing.flush()
    assert (part, part.start, part.end) == ("One moment", 0, 10)
    assert growing.flush() == []
    assert growing.add(" please. ") == []
    (part,) = growing.add("Now")
    assert (part, part.start, part.end) == ("please.", 11, 18)


def test_a_text_that_is_too_long_is_refused_and_may_still_end():
    growing = GrowingText(10, 400)
    growing.add("12345")
    with pytest.raises(ValueError, match="at most 10 characters"):
        growing.add("678901")
    assert growing.add("67890") == []
    assert growing.flush() == ["1234567890"]


@pytest.mark.parametrize("pieces", [["\ude00"], ["a\ud83d", "b"], ["\ud83d\ud83d\ude00"]])
def test_half_a_surrogate_pair_is_refused(pieces):
    growing = GrowingText(100, 400)
    *before, last = pieces
    for piece in before:
        growing.add(piece)
    with pytest.raises(ValueError, match="surrogate"):
        growing.add(last)
    assert growing.add("!") == []


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["a", "A. ", "x ", "\n", "。", "...", "\u0301", "😀"])
def test_single_characters_take_little_memory(piece):
    """And so each of them takes a time that does not depend on the text's length."""
    growing = GrowingText(10**6, 400)
    for character in piece * (40_000 // len(piece)):
        growing.add(character)
        assert len(growing._stream._text) < 2000
