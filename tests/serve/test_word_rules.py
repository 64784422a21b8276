"""A pronouncing dictionary in a tokenizer's normalizer gives the same tokens in one pass."""

import random

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers

from vox_serve.hub import BUILT_IN_VOICES
from vox_serve.word_rules import MIN_WORDS, WordRules

TEXTS = """Please take the second door on the left, and don't forget: it's 7:30 p.m.
I'd've said so, y'all; rock'n'roll 'tis o'clock's 'quoted' dogs' s's x'y'z 'a 'i i'a
Dr. Smith paid $1,250.50 (42%) on the 21st -- "really"?! A.M. a.m. e.g. U.S.A.
zqxv under_score a_b 3rd 4x4 x2 [1] [0]5 ''' '' ' don''t don'tt isn't'isn't
a café, naïve Ünïcode, 東京, \ue001box, ½ ² ǆ ﬁne\u200d \u0300a

<|end_of_text|> <|AUDIO|> tab\tand\nnewline  spaces""".split("\n")  # noqa: SIM905


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(BUILT_IN_VOICES / "demo" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def demo_rules() -> WordRules:
    return find(Tokenizer.from_file(str(BUILT_IN_VOICES / "demo" / "tokenizer.json")))


def find(tokenizer: Tokenizer) -> WordRules | None:
    return WordRules.find(tokenizer.to_str().encode())


def check(tokenizer: Tokenizer, rules: WordRules, text: str) -> None:
    """Compares tokens with the library's."""
    made = rules.normalize(text)
    assert made == tokenizer.normalizer.normalize_str(text), text
    without = Tokenizer.from_buffer(rules.tokenizer_json)
    without.encode_special_tokens = True
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert without.encode(made, add_special_tokens=False).ids == expected, text


def test_built_in_voice_has_the_same_tokens(demo, demo_rules):
    for text in TEXTS:
        check(demo, demo_rules, f"[0]{text}")


def test_random_texts_have_the_same_tokens(demo, demo_rules):
    rng = random.Random(0)
    pieces = "a i s don don't t would've box the ' ' ' o'clock . , - 1 20 _ $ : [ ] n x d'you ll"
    pieces += " bingley zq 's é 東 ² \ue001 \u0301 ghosteling netherfield'd"
    for _ in range(150):
        text = "".join(rng.choices([*pieces.split(), " ", " "], k=rng.randint(1, 40)))
        check(demo, demo_rules, text)


def test_a_long_text_has_the_same_tokens(demo, demo_rules):
    check(demo, demo_rules, "a" * 600 + "'a" * 600 + " Bingley's" * 60 + "\ue001" * 1000 + "x")


def test_any_character_beside_a_word():
    """The library and Python agree on which characters belong to a word."""
    tokenizer = tokenizer_with([*fillers(), (r"\bbox\b", "\ue001"), (r"\ba'b\b", "\ue002")])
    rules = find(tokenizer)
    codes = (*range(1, 0x3000), *range(0x3000, 0xD800, 50), *range(0xF900, 0x20000, 5))
    chars = [chr(code) for code in codes]
    for start in range(0, len(chars), 2000):
        words = (f"{c}box box{c} {c}a'b a'b{c} a{c}'b" for c in chars[start : start + 2000])
        text = " ".join(words)
        assert rules.normalize(text) == tokenizer.normalizer.normalize_str(text)


def fillers() -> list[tuple[str, str]]:
    """MIN_WORDS rules for words that no text here has."""
    return [(rf"\bq{chr(97 + i % 26)}{chr(97 + i // 26)}\b", "\ue000") for i in range(MIN_WORDS)]


def tokenizer_with(rules) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    replace = [normalizers.Replace(Regex(pattern), content) for pattern, content in rules]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *replace])
    return tokenizer


def test_other_tokenizers_stay_whole():
    def words(count, content="\ue000"):
        letters = "abcdefghijklmnopqrstuvwxyz"
        names = [x + y for x in letters for y in letters][:count]
        return [(rf"\b{name}\b", content) for name in names]

    assert find(Tokenizer(models.BPE())) is None
    assert find(tokenizer_with(words(MIN_WORDS - 1))) is None
    assert find(tokenizer_with(words(MIN_WORDS, "letters"))) is None
    two_runs = [*words(MIN_WORDS), ("x", "y"), *words(3)]
    assert find(tokenizer_with(two_runs)) is None
    assert find(tokenizer_with(words(MIN_WORDS))) is not None
    added = tokenizer_with(words(MIN_WORDS))
    added.add_tokens(["ab"])
    assert find(added) is None


def test_earlier_rules_win_and_parts_are_replaced_once():
    words = [(r"\bb'c\b", "\ue001"), (r"\ba'b\b", "\ue002"), (r"\ba\b", "\ue003")]
    words += [(r"(?<!')\bc\b", "\ue004"), (r"\ba\b", "\ue005")]
    tokenizer = tokenizer_with(fillers() + words)
    rules = find(tokenizer)
    texts = ("a'b'c", "a'b'a'b", "a'a'b", "c'c", "'c c' c", "b'c'b'c'a", "a''b", "a'b'b'c", "'a'b'")
    for text in texts:
        check(tokenizer, rules, text)
