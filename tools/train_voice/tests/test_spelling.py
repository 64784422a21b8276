"""Words to phones."""

from tokenizers import Regex, Tokenizer, normalizers

import spelling_rules
from vox_serve.hub import BUILT_IN_VOICES


def test_built_in_tokenizer_spells_in_phones():
    tokenizer = Tokenizer.from_file(str(BUILT_IN_VOICES / "demo" / "tokenizer.json"))

    def spell(text):
        return tokenizer.encode(f"[1]{text}").tokens

    for same, as_well in (
        ("Dr. Smith", "doctor Smith"),
        ("Mrs. Jones, 42%", "mrs jones, forty two percent"),
        ("at 7:30 p.m.", "at seven thirty P M."),
        ("It costs $120, or £1.", "it costs one hundred twenty dollars, or one pound."),
        ("the 21st, 1,250 times", "the twenty first, one thousand two hundred fifty times"),
        ("a café, -5", "a cafe, minus five"),
        ("I didn\u2019t \u2014 stop!", "i didn't stop!"),
    ):
        assert spell(same) == spell(as_well)
    for same, as_well in (("Really!?", "Really?"), ("At 5 p.m.?", "at five p m?")):
        assert spell(same) == spell(as_well)
    so = spell("so")[4:-1]
    assert spell("Is it so?")[4:-1] == [*spell("Is it")[4:-1], " ", "?", *so, "?"]
    assert spell("So?")[4:-1] == ["?", *so, "?"]
    assert spell("hello")[1:4] == ["[", "1", "]"]
    for word in ("hello", "Netherfield", "zqxv", "y'x", "knogh"):
        assert all("\ue000" <= token < "\ue400" for token in spell(word)[4:-1]), word
    assert spell("shunt") == spell("shunted")[:-3] + spell("shunted")[-1:]


def test_spelling_rules_read_words_that_they_have_not_seen():
    sounds = {"sh": ["S"], "ee": ["i"], "kn": ["n"], **{c: [c] for c in "bdfklmnprst"}, "a": ["A"]}
    words = {}
    for start in ("sh", "kn", "b", "f", "m", "s", "t", "l"):
        for middle in ("ee", "a"):
            for end in ("sh", "b", "d", "n", "p", "k", "t"):
                words[start + middle + end] = sounds[start] + sounds[middle] + sounds[end]
    rules = spelling_rules.SpellingRules(words, min_gain=2)
    assert rules.read("kneesh") == ("n", "i", "S")
    assert rules.read("sheemash") == ("S", "i", "m", "A", "S")
    assert rules.read("banks")[:4] == ("b", "A", "n", "k")  # "kn" only at the start
    texts = ["sheemash", "kneeshee", "bankfad", "fee sha"]
    tokenizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(pattern), chr(0xE000 + ord("".join(spoken) or "_")))
            for pattern, spoken in rules.replacements()
            if len(spoken) < 2
        ]
    )
    for text in texts:
        spelt = [chr(0xE000 + ord(phone)) for word in text.split() for phone in rules.read(word)]
        made = tokenizer.normalize_str(text).replace(" ", "").replace(chr(0xE000 + ord("_")), "")
        assert made == "".join(spelt), text
