# ruff: noqa: E501, RUF001, RUF005, SIM905 - a case on one line; signs and dashes as people write them
"""The table is the specification of what is spoken how; docs/text.md shows some of it."""

import random
import re
import string
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from texts import TEST_SENTENCES
from vox_serve.hub import BUILT_IN_VOICES
from vox_serve.text import numbers
from vox_serve.text.normalising import normalise
from vox_serve.text.numbers import cardinal, numeral, ordinal, roman, year

TABLE = {
    "numbers": """
        3 dogs, 21 cats, 105 birds -> three dogs, twenty-one cats, one hundred five birds
        1,000,000 of 12345 and 50000 -> one million of twelve thousand three hundred forty-five and fifty thousand
        3.14, .5, 0.05, 007 -> three point one four, point five, zero point zero five, zero zero seven
        -5 degrees or −0.5, not 5-year-old -> minus five degrees or minus zero point five, not five-year-old
        account 1234567 -> account one two three four five six seven
        12345678901234567890 -> one two three four five six seven eight nine zero one two three four five six seven eight nine zero
        5%, 0.5 %, 10–15% -> five percent, zero point five percent, ten to fifteen percent
        1st, 2nd, 3rd, 21st, 100th -> first, second, third, twenty-first, one hundredth
        1/2, 3/4, 2 1/2, 2/3, 2½ cups -> one half, three quarters, two and a half, two thirds, two and a half cups
        9/11 and 24/7 -> nine eleven and twenty-four seven
        #1 and the No. 5 -> number one and the number five
        5-10 people, pages 3–7 -> five to ten people, pages three to seven
        5 + 3 = 8, 5 - 3 = 2, 2 x 3, 4 × 5 -> five plus three equals eight, five minus three equals two, two times three, four times five
        ~5 and >10 and ≤3 -> about five and more than ten and at most three
        won 3:1, 16:9 -> won three to one, sixteen to nine
        100+ ideas -> one hundred plus ideas
    """,
    "money": """
        $3,000.50 -> three thousand dollars and fifty cents
        $5.3 billion -> five point three billion dollars
        $1,250 -> one thousand two hundred fifty dollars
        $1, $0.99, £1.01, 50¢ -> one dollar, ninety-nine cents, one pound and one penny, fifty cents
        €5, 5 €, 5 EUR, USD 5 -> five euros, five euros, five euros, five dollars
        $5M, $2bn, $5k, US$5 -> five million dollars, two billion dollars, five thousand dollars, five U S dollars
        $5-10 or $5-$10 -> five to ten dollars or five to ten dollars
        -$5 and ¥500 -> minus five dollars and five hundred yen
    """,
    "years and dates": """
        in 2024 -> in twenty twenty-four
        c. 1840 -> circa eighteen forty
        in 1905, 2000, 2005, 1900 -> in nineteen oh five, two thousand, two thousand five, nineteen hundred
        1998-2003 -> nineteen ninety-eight to two thousand three
        the 1990s, '90s -> the nineteen nineties, nineties
        12/25/2024 -> December twenty-fifth, twenty twenty-four
        25/12/2024, 2024-12-25, 25.12.2024 -> December twenty-fifth, twenty twenty-four, December twenty-fifth, twenty twenty-four, December twenty-fifth, twenty twenty-four
        Jan. 5, 2020 -> January fifth, twenty twenty
        on 5 January, Dec 25 -> on the fifth of January, December twenty-fifth
        March 2024 -> March twenty twenty-four
        1500 people -> fifteen hundred people
        1234 apples -> one thousand two hundred thirty-four apples
    """,
    "times": """
        10:05 am -> ten oh five ay M
        5:30pm -> five thirty P M
        5pm, 5:00, 17:45, 12:00 p.m. -> five P M, five o'clock, seventeen forty-five, twelve P M.
        It is 5 p.m. We go at 6 a.m. today. -> It is five P M. We go at six ay M today.
    """,
    "telephones": """
        Call 911. -> Call nine one one.
        555-1234 -> five five five, one two three four
        (555) 123-4567 -> five five five, one two three, four five six seven
        +1 555 123 4567 -> plus one, five five five, one two three, four five six seven
    """,
    "versions": """
        1.2.3, v2.0 -> one point two point three, version two point zero
        10.0.0.1 -> ten dot zero dot zero dot one
    """,
    "units": """
        50 °C, 1 °F, 90° -> fifty degrees Celsius, one degree Fahrenheit, ninety degrees
        60 km/h, 5 kg, 16GB, 1 GB -> sixty kilometers per hour, five kilograms, sixteen gigabytes, one gigabyte
        a 5-km run, 6 ft. tall, 6'2" -> a five-kilometer run, six feet tall, six feet two inches
        100 m², 70mph, 2.4 GHz -> one hundred square meters, seventy miles per hour, two point four gigahertz
    """,
    "abbreviations": """
        Dr. Smith and Prof. Lee -> Doctor Smith and Professor Lee
        fruit, e.g. apples, i.e. pomes, etc. -> fruit, for example apples, that is pomes, et cetera.
        It was red, etc. The end. -> It was red, et cetera. The end.
        Lions vs. Tigers -> Lions versus Tigers
        Main St. in St. Louis -> Main Street in Saint Louis
        On 5th St. he stops. -> On fifth Street he stops.
        Fig. 3, p. 5, pp. 5-7, Vol. 2 -> figure three, page five, pages five to seven, volume two
        No. It is not. -> No. It is not.
        It is O.K. to go. -> It is OK to go.
        John F. Kennedy, J. Smith -> John F Kennedy, J Smith
        On Mon. in Sept. we go w/o him. -> On Monday in September we go without him.
    """,
    "acronyms": """
        the FBI's chief, the UK and HTML pages -> the F B I's chief, the U K and H T M L pages
        the U.S. Army; she likes the U.S. He does not. -> the U S Army; she likes the U S. He does not.
        NASA, NATO and UNESCO agree -> NASA, NATO and UNESCO agree
        STOP SHOUTING AT THE FBI -> STOP SHOUTING AT THE FBI
        COVID-19, MP3, A4, 3D prints -> COVID-nineteen, M P three, ay four, three D prints
        AT&T, R&D, C++ -> AT and T, R and D, C plus plus
        codes => frames -> codes to frames
        CSM-1B, GPUs, C++20 -> C S M-one B, G P U's, C plus plus twenty
    """,
    "Roman numerals": """
        Henry VIII and Elizabeth II -> Henry the eighth and Elizabeth the second
        World War II, Chapter IV -> World War two, Chapter four
        Henry I think, but Henry I of England -> Henry I think, but Henry the first of England
        I am vitamin C and X. -> I am vitamin C and X.
    """,
    "addresses": """
        a@b.com -> ay at B dot com
        https://example.com/a -> example dot com slash ay
        Go to www.example.org. -> Go to example dot org.
        example.co.uk/x_y?z=1 -> example dot co dot U K slash X underscore Y question mark Z equals one
        @john likes #music in notes.txt -> at john likes hashtag music in notes dot T X T
    """,
    "brackets": """
        [1]The result was good. -> one, The result was good.
        The result was good.[1] So was this [2, 3]. -> The result was good. So was this two, three.
        He said `[0]` and x[1]. -> He said zero and x.
        She [laughs] went. -> She laughs went.
    """,
    "markup": """
        **bold**, _it_, `code`, ~~gone~~ -> bold, it, code, gone
        [the page](https://example.com/a) -> the page
        Tom &amp; Jerry<br>run -> Tom and Jerry run
        # Title -> Title
        - item -> item
        1. First -> one, First
    """,
    "emoji": """
        I love it 😀👍! -> I love it!
        Hello :) you -> Hello you
        😀 -> grinning face
    """,
}
CASES = [
    tuple(line.strip().split(" -> "))
    for lines in TABLE.values()
    for line in lines.strip().split("\n")
]


@pytest.mark.parametrize(("written", "spoken"), CASES)
def test_the_table(written, spoken):
    assert normalise(written) == spoken
    assert normalise(spoken) == spoken


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("Hello\nworld", "Hello, world"),
        ("- an item that\n  is wrapped\n- another", "an item that, is wrapped. another"),
        ("A heading\nThe text.\r\nMore", "A heading. The text. More"),
        ("# Title\n\n- one\n- two\n\nText.", "Title. one. two. Text."),
        ("an item:\n1. First\n2) Second", "an item: one, First. two, Second"),
        ("```python\nx\n```\n---\nThe end", "x. The end"),
        ("| a | b |\n|---|---|\n| c | d |", "a, b. c, d"),
        (
            "a line so long that it was surely wrapped by an editor\nand not by its writer",
            "a line so long that it was surely wrapped by an editor and not by its writer",
        ),
    ],
)
def test_line_ends_pause_unless_lines_were_wrapped(written, spoken):
    assert normalise(written) == spoken


@pytest.mark.parametrize(
    "text",
    [
        "Hello there.",
        'He said "Yes, (perhaps)!"  and - well... left; she didn\'t.',
        "It’s “fine” – really – isn’t it?",
        "Mr. and Mrs. Smith met Ms. Lee.",
        "No. I may go in March. The sun and the cat sat.",
        "OK, I am OK. NASA is not.",
        "Ça va ? 你好。 Привет!",
        " spaces at both ends ",
        "...",
        "",
    ],
)
def test_plain_text_is_unchanged(text):
    assert normalise(text) == text


def test_the_documented_table_is_what_is_spoken():
    page = (Path(__file__).parents[2] / "docs" / "text.md").read_text()
    _, table = page.split("| written | spoken |")
    rows = re.findall(r"^\| `(.+)` \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) > 20
    assert {row: normalise(row) for row, _ in rows} == dict(rows)


def test_numbers():
    assert cardinal(0) == "zero"
    assert cardinal(1_000_001) == "one million one"
    assert cardinal(10**18 - 1).count("nine") == 18
    assert [ordinal(n) for n in (12, 20, 101)] == ["twelfth", "twentieth", "one hundred first"]
    assert [year(n) for n in (1066, 1100, 2010)] == [
        "ten sixty-six",
        "eleven hundred",
        "twenty ten",
    ]
    assert numeral("1,00") == "one point zero zero"
    assert numeral("\u0663") == ""  # no ASCII digit: skipped, as by `digits`
    assert [roman(r) for r in ("IV", "XIX", "LXXXVIII", "IIII", "VX", "")] == [
        4,
        19,
        88,
        *[None] * 3,
    ]
    spoken = [cardinal(n) for n in range(10_000)]
    assert len(set(spoken)) == 10_000
    assert {word for words in spoken for word in re.split("[ -]", words)} == (
        {*numbers.ONES, *numbers.TENS, "hundred", "thousand"}
    )


REQUIRED = (
    "$3,000.50|$5.3 billion|$1,250|in 2024|1998-2003|12/25/2024|10:05 am|5:30pm|50 °C|#1|a@b.com|Dr.|e.g.|2nd"
    "|https://example.com/a|[1]The result was good."
).split("|")
LETTERED = {"celsius", "com"}
"""Words that the built-in voice's tokenizer leaves to the model as letters."""


@pytest.fixture(scope="module")
def tokens():
    """The built-in voice's tokens for a text of speaker 0: phones, letters and punctuation."""
    tokenizer = Tokenizer.from_file(str(BUILT_IN_VOICES / "demo" / "tokenizer.json"))
    return lambda text: tokenizer.encode(f"[0]{text}", add_special_tokens=False).tokens


@pytest.mark.parametrize("written", REQUIRED)
def test_the_built_in_voice_gets_phones(written, tokens):
    found = tokens(normalise(written))
    assert found[:3] == ["[", "0", "]"]
    assert not set(found[3:]) & {*"[]0123456789", "<unk>"}
    for word in normalise(written).split():
        letters = [token for token in tokens(word)[3:] if token in string.ascii_letters]
        assert not letters or word.lower().strip(",.") in LETTERED, word


@pytest.mark.parametrize("text", TEST_SENTENCES)
def test_the_voices_test_sentences_get_the_prompts_that_they_had(text, tokens):
    assert tokens(normalise(text)) == tokens(text)


ATOMS = (
    r"0 1 2 5 7 10 12 24 25 50 99 100 007 1998 2003 2024 3,000 3,000.50 .5 5.3 1.2.3 12345 , . : ; ! ? - – / \ "
    "( ) [ ] { } < > # $ € £ % & * _ ~ ` | @ + = ^ ° ² ½ ' \" ’ “ … → © 😀 ❤️ a A b B C I K M am pm p.m. a.m. kg "
    "km/h GB °C m s in min million billion k Dr. Mr. St. No. Fig. e.g. etc. vs. U.S. FBI NASA TV Jan. December "
    "Henry VIII Chapter IV st nd th http:// https://example.com/a www. .com a@b.com - # > 1. [1] ** __ `` word "
    "Word The He and to of é 你好 ٣ ３ <b> </b> &amp; &lt; J. R. |---| ``` :)"
).split(" ") + ["\n", "\n\n", "\r\n", "\t", "\u00a0", "\u200b", "\ud800", "\0", "\u0301"]


def test_what_was_normalised_has_no_numerals_and_stays():
    random_source = random.Random(16)
    for _ in range(1500):
        spaces = random_source.choice([0.1, 0.5, 1])
        text = "".join(
            random_source.choice(ATOMS) + " " * (random_source.random() < spaces)
            for _ in range(random_source.randrange(1, 14))
        )
        spoken = normalise(text)
        assert normalise(spoken) == spoken, text
        if any(map(str.isalnum, spoken)):
            assert not set(spoken) & set("0123456789[]"), (text, spoken)
        assert bool(spoken.strip()) == bool(text.strip()), text


HOSTILE = (
    "1|1,|1.|1,111|-1|1-|1/|1:|1 |1 - |$1|$1-|$1 to |a.|A. |a@|a@b.|[|[1]|[a](|<|<a|*|_|`|#|\n- |&amp;|http://|a.b|"
    "AB |St. |No. |Dr. |😀|x |\u0301|½|°|I V |Henry I |(|1 (|+1|1st|v1|1 k|1 km/h|'|\t|1999 |10:05 |Jan 5, |--|~|"
    "=1|<1|1x|12/12/|5 1/2|call 1 |+1-1 (1) |0|aA1"
).split("|")


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_linear_time(piece):
    def seconds(num_chars: int) -> float:
        start = time.process_time()
        normalise(piece * (num_chars // len(piece)))
        return time.process_time() - start

    seconds(1000)
    assert seconds(8000) < 1 + 20 * seconds(1000)  # eight times, and noise; quadratic: 64
