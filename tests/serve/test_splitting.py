# ruff: noqa: RUF001, SIM905 - punctuation of other scripts; word lists
import random
import time
import unicodedata

import pytest

from vox_serve.text.splitting import SentenceStream, split


def squeezed(text):
    return "".join(text.split())


SENTENCES = [
    # abbreviations, titles, initials
    "Dr. Smith met Mr. and Mrs. J. R. R. Tolkien. | He left.",
    "She studied with Prof. A. Einstein. | Then she taught.",
    "Fruit, e.g. apples, i.e. pomes. | Bring some, etc. to the party.",
    "He moved to the U.S. | He likes it.",
    "He joined the U.S. Army in Jan. 2020.",
    "It opens at 5 p.m. | The doors are blue.",
    "It opens at 5 p.m. Monday.",
    "He lives in St. Louis.",
    "He lives on Main St. | She does not.",
    "Acme Inc. reported a loss. | The U.K. Parliament did not.",
    "It was the Lions vs. Tigers. | Who won?",
    "Turn to p. 5, Fig. 3 and Vol. 2. | Then read.",
    "She chose No. 5. | No. | I did not.",
    "So did I. | He did not.",
    "The cat sat. | John saw art. | Mary saw the sun. | Bob did not.",
    "See Smith et al. in Sec. B of it.",
    # numbers, URLs, addresses
    "It costs $3,000.50 today. | Or 5.3 times that.",
    "It was in 2024. | 15 people came.",
    "See https://example.com/a.b?c=d. | Write to a@b.com. | Bye.",
    "Version 1.2.3 of foo.py is out! | Get it.",
    # quotes and brackets
    'She said "Go away!" and left. | Then he came.',
    '"Is it?" she asked. | “Yes.” | He nodded.',
    '"Stop!" John said. | "Why?" | Mary had no answer.',
    "(This is it.) | And (as of Jan. 5) that.",
    "He cried «Non !» | «Oui.»",
    "**Bold claim.** | _Really._",
    # ellipses and runs of marks
    "Wait... what? | Hm... | So it is.",
    "And... I do not know. | Wow . . . yes.",
    "Well… maybe. | No way?! | Yes!!!",
    # lists, lines, headings
    "1. First item | 2. Second item | 3. Third",
    "- milk | - eggs. | * flour",
    "Chapter One | It was a dark night.",
    # other scripts
    "你好。 | 我是人。 | 「什么？」他说。",
    "そうです。 | 「はい。」 | 「いいえ！」と言った。",
    "क्या हाल है? | मैं ठीक हूँ। | अच्छा।",
    "كيف حالك؟ | بخير.",
]
LINES = {"1. First", "- milk", "Chapter"}


@pytest.mark.parametrize("marked", SENTENCES)
def test_sentences(marked):
    expected = marked.split(" | ")
    wide = unicodedata.east_asian_width(marked[0]) == "W"
    between = "\n" if any(marked.startswith(line) for line in LINES) else "" if wide else " "
    assert split(between.join(expected), 1000, 0) == expected


def test_wrapped_lines_do_not_end_sentences():
    text = (
        "This is a paragraph of a letter whose lines are wrapped at about sixty\n"
        "characters, so that the name of a person such as\nJohn may begin a line. It\nwent well."
    )
    first, second = split(text, 1000, 0)
    assert first.endswith(
        "sixty characters, so that the name of a person such as John may begin a line."
    )
    assert second == "It\nwent well."


def test_verse_stays_together_at_commas():
    text = "Roses are red,\nViolets are blue\nSugar is sweet"
    assert split(text, 1000, 0) == ["Roses are red,\nViolets are blue", "Sugar is sweet"]


def test_short_sentences_are_packed():
    text = "One is here. Two is there. Three is nowhere to be seen."
    assert split(text, 100, 30) == ["One is here. Two is there.", "Three is nowhere to be seen."]
    assert split(text, 100, 100) == [text]
    assert split("Yes. " + "No " * 65 + "ends.", 1000, 200) == ["Yes. " + "No " * 65 + "ends."]


def test_a_very_short_sentence_joins_its_neighbour():
    long = "word " * 39 + "ends."  # 200 characters
    assert split(f"Yes. {long}", 1000) == [f"Yes. {long}"]
    assert split(f"{long} Yes.", 1000) == [f"{long} Yes."]
    assert split(f"{long} Yes.", 200) == [long, "Yes."]


def test_a_blank_line_ends_a_part():
    parts = split("A title\n\nOne. Two.\r\n \r\nThree.\x0cFour.\nFive.", 1000)
    assert parts == ["A title", "One. Two.", "Three.", "Four.\nFive."]
    assert all(part.ends_paragraph for part in parts)
    parts = split("One is one. Two is two.\n\nThree.", 1000, 0)
    assert [part.ends_paragraph for part in parts] == [False, True, True]


def test_a_long_sentence_is_cut_at_clauses_then_words():
    text = "the first clause is here; the second, which is longer, goes on and on and on until"
    assert split(text, 40, 0) == [
        "the first clause is here;",
        "the second, which is longer,",
        "goes on and on and on until",
    ]
    assert split("one two three four five", 9, 0) == ["one two", "three", "four five"]
    assert split("甲乙丙、丁戊己庚辛壬癸", 6, 0) == ["甲乙丙、", "丁戊己庚辛壬", "癸"]


@pytest.mark.parametrize(
    "character", ["e\u0301", "👨\u200d👩\u200d👧", "👍🏽", "🇩🇪", "\u1112\u1161\u11ab", "❤\ufe0f"]
)
def test_a_long_word_is_cut_between_whole_characters(character):
    parts = split(character * 50, 12, 0)
    assert squeezed("".join(parts)) == character * 50
    assert all(len(part) % len(character) == 0 for part in parts)


def test_blank_texts_have_no_parts():
    assert split("", 10) == split(" \n\n \t", 10) == []


@pytest.mark.parametrize(("max_chars", "preferred_chars"), [(0, 0), (1, -1)])
def test_bad_lengths_are_refused(max_chars, preferred_chars):
    with pytest.raises(ValueError, match="_chars must be"):
        split("text", max_chars, preferred_chars)


def test_a_stream_emits_a_sentence_when_the_next_begins():
    stream = SentenceStream(1000)
    assert stream.feed("Hello the") == []
    assert stream.feed("re. ") == []
    assert stream.feed("H") == ["Hello there."]
    assert stream.feed("ow are you?\n\n") == ["How are you?"]
    assert stream.feed("Dr. ") == []
    assert stream.feed("Who") == []
    assert stream.end() == ["Dr. Who"]
    assert stream.feed("Again. X") == ["Again."]
    assert stream.end() == ["X"]


SEPARATORS = [" ", " ", " ", "  ", "\t", "\n", "\n\n", "\r", "\r\n", "\u2029"]
SIGNS = [*".....!?…。,;-\"'“”()«»*#", "...", "？」", "- ", "1. ", "a) "]
WORDS = (
    "Dr St No U.S p.m e.g Inc J I I'm The He said John word another 5 2024 你好 e\u0301 "
    "👨\u200d👩 🇩🇪🇫🇷 http://a.b/c?d"
).split(" ")
PIECES = [*SEPARATORS, *SIGNS, *WORDS]


def test_any_fragmentation_gives_the_same_parts():
    random_source = random.Random(16)
    for _ in range(2000):
        text = "".join(random_source.choices(PIECES, k=random_source.randrange(40)))
        max_chars = random_source.choice([1, 2, 7, 20, 60, 1000])
        preferred_chars = random_source.choice([0, 10, 30, 200])
        whole = split(text, max_chars, preferred_chars)
        assert squeezed("".join(whole)) == squeezed(text)
        assert all(0 < len(part) <= max_chars for part in whole), (text, max_chars)
        assert all(part == part.strip() for part in whole), (text, max_chars)
        stream = SentenceStream(max_chars, preferred_chars)
        parts, rest = [], text
        while rest:
            count = random_source.choice([1, 1, 2, 5, 50])
            parts += stream.feed(rest[:count])
            rest = rest[count:]
        parts += stream.end()
        assert parts == whole, (text, max_chars, preferred_chars)
        for name in ("ends_paragraph", "start", "end"):
            assert [getattr(p, name) for p in parts] == [getattr(p, name) for p in whole]
        assert [squeezed(text[p.start : p.end]) for p in parts] == [squeezed(p) for p in parts]


HOSTILE = {
    "letters": "a",
    "spaces": " ",
    "x and spaces": "x" + " " * 1000,
    "line ends": "\nx",
    "full stops": ".",
    "initials": "A. ",
    "marks": 'a!" ',
    "quotes": '"',
    "open brackets": "( ",
    "wide full stops": "。」",
    "accents": "\u0301",
    "joiners": "\u200d",
    "flags": "🇦",
    "surrogates": "\ud800",
    "nulls": "\0",
}


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_takes_linear_time(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    parts = split(text, 500)
    assert time.process_time() - start < 20  # 0.1 to 1 s; quadratic time is minutes
    assert squeezed("".join(parts)) == squeezed(text)
    stream = SentenceStream(500)
    for i in range(0, 30_000, 2):
        stream.feed(text[i : i + 2])
        assert len(stream._text) < 2000
