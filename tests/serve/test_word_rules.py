"""A pronouncing dictionary in a tokenizer's normalizer gives the same tokens in one pass."""

import random

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers

from vox_serve.hub import BUILT_IN_VOICES
from vox_serve.word_rules import MAX_CHARS, MIN_WORDS, WordRules

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


def check(tokenizer: Tokenizer, rules: WordRules, text: str) -> bool:
    """Compares tokens; False if the text is left to the original tokenizer."""
    made = rules.normalize(text)
    if made is None:
        return False
    assert made == tokenizer.normalizer.normalize_str(text), text
    rules.tokenizer.encode_special_tokens = True
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert rules.tokenizer.encode(made, add_special_tokens=False).ids == expected, text
    return True


def test_built_in_voice_has_the_same_tokens(demo):
    rules = WordRules.find(demo)
    assert [check(demo, rules, f"[0]{text}") for text in TEXTS] == [True] * 4 + [False] + [True] * 3


def test_random_texts_have_the_same_tokens(demo):
    rules = WordRules.find(demo)
    rng = random.Random(0)
    pieces = "a i s don don't t would've box the ' ' ' o'clock . , - 1 20 _ $ : [ ] n x d'you ll"
    for _ in range(150):
        check(demo, rules, "".join(rng.choices([*pieces.split(), " ", " "], k=rng.randint(1, 40))))


def test_a_long_text_is_left_to_the_library(demo):
    rules = WordRules.find(demo)
    assert rules.normalize("a" * MAX_CHARS) is not None
    assert rules.normalize("a" * (MAX_CHARS + 1)) is None


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

    assert WordRules.find(Tokenizer(models.BPE())) is None
    assert WordRules.find(tokenizer_with(words(MIN_WORDS - 1))) is None
    assert WordRules.find(tokenizer_with(words(MIN_WORDS, "letters"))) is None
    two_runs = [*words(MIN_WORDS), ("x", "y"), *words(3)]
    assert WordRules.find(tokenizer_with(two_runs)) is None
    assert WordRules.find(tokenizer_with(words(MIN_WORDS))) is not None
    added = tokenizer_with(words(MIN_WORDS))
    added.add_tokens(["ab"])
    assert WordRules.find(added) is None


def test_earlier_rules_win_and_parts_are_replaced_once():
    filler = [(rf"\bq{chr(97 + i % 26)}{chr(97 + i // 26)}\b", "\ue000") for i in range(MIN_WORDS)]
    words = [(r"\bb'c\b", "\ue001"), (r"\ba'b\b", "\ue002"), (r"\ba\b", "\ue003")]
    words += [(r"(?<!')\bc\b", "\ue004"), (r"\ba\b", "\ue005")]
    tokenizer = tokenizer_with(filler + words)
    rules = WordRules.find(tokenizer)
    texts = ("a'b'c", "a'b'a'b", "a'a'b", "c'c", "'c c' c", "b'c'b'c'a", "a''b", "a'b'b'c", "'a'b'")
    assert all(check(tokenizer, rules, text) for text in texts)
