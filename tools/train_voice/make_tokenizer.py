# ruff: noqa: SIM905, RUF001 - word lists read better as text
"""Step 3: build an ordinary tokenizer.json that spells English in phones.

    python make_tokenizer.py RUN [--words 32000]

A language model this small cannot learn English spelling from a few hours of speech, and does not
have to: the tokenizer's normalizer (a list of `Replace` rules) writes common words as phones, one
character of Unicode's private use area per phone, from the teacher's own lexicon. Rules that are
learnt from these words spell the others (`spelling_rules.py`). Every character is one token.
"""

import argparse
import collections
import re
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, processors
from tokenizers.models import BPE

from common import FIRST_PHONE
from spelling_rules import SpellingRules
from teacher import STRESS, join_stress
from texts import TEMPLATES, WORDNET_FOLDER, WORDS, corpus

FIRST_SPELT_DIGIT = 0xF8F0
COMMON_WORDS = Path("/usr/share/dict/american-english-small")  # Debian's wamerican-small
SILENT = chr(0xF8FF)  # stands for letters without a sound until all letters are read
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>", "<unk>"]
FORM_TEXTS = 8000
USUAL_WORDS = 17000
MIN_GAIN = 5  # see SpellingRules
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
PUNCTUATION = " ,.?!"
ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINAL_WORDS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
).split()
UNITS = (
    "hundred thousand percent dollar dollars pound pounds euro euros minus point thirtieth".split()
)
# Everyday words that are rare in a dictionary's examples.
EVERYDAY = """oh hello hi
hey bye goodbye okay ok yes no yeah please thanks thank sorry welcome excuse
pardon maybe sure really great fine nice good morning afternoon evening night today tomorrow
yesterday tonight monday tuesday wednesday thursday friday saturday sunday january february march
april may june july august september october november december don't can't won't isn't aren't
wasn't weren't doesn't didn't haven't hasn't hadn't wouldn't couldn't shouldn't i'm you're he's
she's it's we're they're i've you've we've they've i'll you'll he'll she'll it'll we'll they'll i'd
you'd he'd she'd we'd they'd that's there's here's what's who's where's let's pizza sandwich burger
salad pasta cookie cookies chocolate lemonade pancake pancakes breakfast brunch lunch dinner snack
email internet website online laptop tablet app phone phones charger battery password download
upload video photo photos selfie camera computer keyboard screen printer software update wifi
bicycle scooter taxi subway highway parking garage airport luggage passport ticket tickets gym
vacation holiday birthday christmas weekend party wedding mom dad grandma grandpa aunt uncle cousin
nephew niece kid kids baby girlfriend boyfriend roommate neighbor neighbors colleague boss coworker
doctor dentist nurse teacher student students homework exam exams classroom college apartment
bathroom bedroom bedrooms balcony kitchen sofa couch fridge oven microwave dishwasher laundry
shampoo toothbrush towel pillow blanket jacket jeans shirt sweater sneakers supermarket grocery
groceries mall shop shops store bakery cafe restaurant menu waiter bill receipt refund discount
credit cash dollars cents euros traffic jam detour awesome amazing awful terrible delicious funny
weird crazy favorite colour color centre center football basketball baseball soccer tennis guitar
piano concert concerts movie movies theater jazz english french spanish german chinese american
someone somebody something anyone anybody anything everyone everybody everything nobody none nothing
somewhere anywhere everywhere nowhere myself yourself himself herself itself ourselves themselves
london paris america england europe canada robot speech voice streaming text
mr mrs ms dr vs tv uk usa shall unless whenever whoever wherever whereas whilst whether till upon
gonna wanna gotta kinda ain't it'd that'll would've should've could've might've anytime anyways
someday sometime nowadays meantime basically hopefully fortunately genuinely apparently super wow
huh hmm oops alright congratulations cheers hooray media global google facebook twitter youtube
video videos blog podcast website websites playlist channel app apps tech info data login logout
email emails inbox spam desktop smartphone android tablets wireless bluetooth charger usb upload
uploaded updates updated upgrade backup delete deleted click browser server servers robots drone
update option options format default highlight highlights update budget budgets deadline schedule
schedules scheduled recipe recipes curry noodles banana bananas peanut peanuts avocado yogurt cereal
cupcake muffin smoothie barbecue vegan puppy puppies kitten kittens bunny pets zoo aquarium dinosaur
rainbow sunset sunrise sunny rainy cloudy snowy windy stormy foggy weekend weekends halloween
thanksgiving easter fireworks cinema concert stadium arena tournament championship medal trophy
rugby cricket hockey volleyball marathon workout yoga fitness skateboard motorcycle bike bikes
helicopter ferry airline airlines runway terminal suitcase backpack souvenir hostel hotels cottage
mansion basement garage driveway backyard neighborhood neighbourhood downtown avenue highway
roundabout crosswalk ambulance pharmacy prescription vaccine vitamin dentist clinic therapist
allergy flu headache toothache healthcare insurance mortgage rental lawyer accountant engineer
engineers scientist scientists chef librarian receptionist electrician plumber mechanic babysitter
entrepreneur freelancer teammate teammates roommate roommates classmate classmates buddy mate mates
daddy mommy mum mama grandson granddaughter sibling siblings toddler teenager teenagers teens
adorable awkward annoying boring exciting frustrating hilarious gorgeous handsome incredible
incredibly fabulous fantastic horrible terrifying stunning scary spooky tricky cute cozy crispy
creamy spicy yummy fluffy sparkly shiny organic electric digital virtual automatic optional
affordable accessible sustainable environment climate pollution recycling solar renewable galaxy
planet planets asteroid telescope astronaut algorithm database keyboard podcast documentary cartoon
animation comedy thriller sequel soundtrack guitarist drummer choir orchestra melody lyrics anna
peter mary john sarah david emma michael laura james linda robert alice thomas susan daniel helen
paul julia mark george nancy oliver grace henry sophie lucas karen brian ruth tom chris mike joe
frank martin lee harry scott steve ben max sam alex jim dan kim nick ryan jackson andrew kevin matt
simon adam eric jason donald alan jeff luke dave jimmy kelly jane arthur anthony dean francis gary
roger ross allen clark jay gordon matthew patrick phil wayne jean walter ann johnny kate maria bruce
robin anne justin rick sean jon jonathan lawrence oscar lisa larry philip murray jerry ted danny roy
albert carl marshall mitchell aaron jacob leo margaret mario charlotte christopher evan ron douglas
fred jose ken amy barbara jennifer samuel stanley jake jamie jessica keith kent victor antonio
benjamin neil harvey jeremy collin rachel emily kyle mason norman vincent eddie nathan stuart brad
juan pete catherine dennis ralph rebecca carlos colin julie marcus ellen dylan hannah logan zoe mia
olivia sophia isabella ava chloe lily ella noah liam ethan caroline bradley derek victoria amanda
nicole lauren martha claire natalie smith johnson williams brown jones miller wilson taylor
thompson washington boston chicago texas florida california seattle houston dallas denver atlanta
philadelphia phoenix vegas hollywood manhattan brooklyn toronto vancouver montreal sydney melbourne
dublin edinburgh glasgow manchester liverpool oxford cambridge berlin munich vienna rome milan
venice madrid barcelona lisbon amsterdam brussels zurich geneva prague athens istanbul moscow dubai
delhi mumbai bangkok singapore shanghai beijing tokyo seoul africa asia australia brazil mexico
argentina egypt kenya nigeria india pakistan china japan korea russia ukraine germany france italy
spain portugal greece turkey poland sweden norway finland denmark iceland ireland scotland wales
britain netherlands belgium switzerland austria italian russian japanese korean arabic dutch
swedish portuguese australian canadian mexican brazilian african european asian british irish
scottish celsius com versus cetera kilometers gigabytes hertz pence trillion""".split()


def word_counts(lexicon) -> collections.Counter:
    """Counts of words in WordNet's definitions and examples, in the training templates, and of
    everyday words."""
    counts = collections.Counter()
    for part in ("noun", "verb", "adj", "adv"):
        text = (WORDNET_FOLDER / f"data.{part}").read_text(encoding="utf8", errors="ignore")
        for line in text.splitlines():
            counts.update(re.findall(r"[a-z]+(?:'[a-z]+)?", line.partition("|")[2].lower()))
    # Lemma frequencies of a tagged corpus, in lines "lemma%sense count".
    for line in (WORDNET_FOLDER / "cntlist.rev").read_text().splitlines():
        sense, _, count = line.split()
        lemma = sense.partition("%")[0]
        if lemma.isalpha():
            counts[lemma] += 2 * int(count)
    for text in [*TEMPLATES, *(" ".join(words) for words in WORDS.values())]:
        for word in re.findall(r"[a-z]+(?:'[a-z]+)?", re.sub(r"\{\w+\}\w*", "", text.lower())):
            counts[word] += 1000
    for word, lemma in list(inflections(counts)):
        if word in counts or lexicon.golds.get(word) or lexicon.silvers.get(word):
            counts[word] += counts[lemma] // 3
    for word in COMMON_WORDS.read_text(encoding="utf8").split():
        counts[word.lower()] += 4
    for word in [*EVERYDAY, *ONES, *TEENS, *TENS[2:], *ORDINAL_WORDS, *UNITS]:
        counts[word] += 1000
    return counts


def inflections(counts):
    """Yields (word, lemma) for the possible regular inflections of every word."""
    for lemma in list(counts):
        if len(lemma) < 3:
            continue
        if lemma.endswith("e"):
            endings, stem = ("es", "ed", "ing", "er", "y"), lemma[:-1]
        elif lemma.endswith("y") and lemma[-2] not in "aeou":
            endings, stem = ("ies", "ied", "ying", "ier", "ily"), lemma[:-1]
        else:
            endings, stem = ("s", "ed", "ing", "er", "ly", "y"), lemma
        yield from ((stem + ending, lemma) for ending in endings)


def spoken_forms(frontend, texts) -> dict[str, str]:
    """The teacher's usual pronunciation of each word within sentences ("am", "the", "to")."""
    forms = collections.defaultdict(collections.Counter)
    for text in texts:
        for token in frontend.g2p.phonemize_tokens(frontend.g2p.tokenize(text)):
            if token.phonemes:
                forms[token.text.lower()][token.phonemes] += 1
    return {word: counts.most_common(1)[0][0] for word, counts in forms.items()}


def word_phones(word: str, frontend, forms: dict[str, str]) -> list[str] | None:
    """The teacher's phones for a word: as in sentences if it occurs there, otherwise on its own."""
    phonemes = forms.get(word) or "".join(frontend.phonemize(word)).strip()
    symbols = [c for c in phonemes if c in frontend.vocab and c not in ' ,.?!;:—“”"']
    return [phone for phone, _ in join_stress(symbols, range(len(symbols)))] or None


def ordinals() -> dict[str, str]:
    """ "1st" to "31st"."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    found = {f"{n}{endings.get(n, 'th')}": word for n, word in enumerate(ORDINAL_WORDS, 1)}
    for n in range(21, 30):
        found[f"{n}{endings.get(n % 10, 'th')}"] = f"twenty {ORDINAL_WORDS[n % 10 - 1]}"
    return found | {"30th": "thirtieth", "31st": "thirty first"}


def number_rules() -> list[tuple[str, str]]:
    """Rules from digits to words: 0 to 999 and their thousands, clock times, ordinals to 31st,
    dollars and pounds; other long numbers are read digit by digit.

    The assertions around the digits protect the speaker in the prompt's `[0]`.
    """
    rules = [(r"(?<=\d),000\b", " thousand"), (r"(?<=\d),(?=\d{3}\b)", " thousand ")]
    rules += [(r"(?<=\d):00\b", " o'clock"), (r"(?<=\d):(?=\d)", " ")]
    # The sign precedes the number, but its word follows it: the word is inserted after the digits
    # and the sign removed.
    for sign, unit in ((r"\$", "dollars"), ("£", "pounds"), ("€", "euros")):
        rules += [(rf"(?<={sign}1)(?!\d|[.,]\d|\sthousand)", f" {unit[:-1]}")]
        after = rf"(?<={sign}\d(?:\.\d\d)?|{sign}\d\d(?:\.\d\d)?|{sign}\d\d\d(?:\.\d\d)?)"
        rules += [(rf"{after}(?!\d|\.\d|\s(?:{unit[:-1]}|thousand))", f" {unit}"), (sign, "")]
    rules += [(r"(?<!\w)-(?=\d)", "minus ")]
    rules += [(r"(?<=\d)\.(?=\d)", " point "), ("%", " percent"), ("&", " and ")]
    rules += [(rf"\b{digits}\b", word) for digits, word in ordinals().items()]
    spelt = [chr(FIRST_SPELT_DIGIT + i) for i in range(10)]
    d = f"[0-9{spelt[0]}-{spelt[9]}]"
    for i in range(10):
        around = (f"{i}(?={d}{{3}})", f"(?<={d}){i}(?={d}{{2}})")
        around += (f"(?<={d}{{2}}){i}(?={d})", f"(?<={d}{{3}}){i}")
        rules.append(("|".join(around), spelt[i]))
    rules += [(f"(?<=[a-z]){i}|{i}(?=[a-z])", spelt[i]) for i in range(10)]
    for i in range(1, 10):
        rules.append((rf"(?<![\d\[]){i}00(?!\d)", f"{ONES[i]} hundred"))
        rules.append((rf"(?<![\d\[]){i}(?=\d\d(?!\d))", f"{ONES[i]} hundred "))
    rules += [(rf"1{i}(?!\d)", TEENS[i]) for i in range(10)]
    for i in range(2, 10):
        rules.append((rf"{i}0(?!\d)", TENS[i]))
        rules.append((rf"{i}(?=\d(?!\d))", f"{TENS[i]} "))
    rules += [(r"(?<= )0(?=[1-9]\b)", "oh ")]
    rules += [(rf"(?<![\[]){i}(?!\])", f" {ONES[i]} ") for i in range(10)]
    rules += [(spelt[i], f" {ONES[i]} ") for i in range(10)]
    return rules


def build(words: dict[str, list[str]], phones: list[str]) -> Tokenizer:
    char = {phone: chr(FIRST_PHONE + i) for i, phone in enumerate(phones)}
    rules = [("[‘’]", "'"), ('["“”()*_~]', ""), (r"(?<=\b(?:mr|ms|dr|vs|st))\.|(?<=\bmrs)\.", "")]
    rules += [(r"\ba\.m\b", "ay m"), (r"(?<=\b[a-z])\.(?=[a-z]\b)", " ")]
    rules += [(r"(?<=\b(?:p|ay) m)\.(?= [a-z])", ""), *number_rules()]
    rules += [("[-–—/]+", " "), ("[;:…]+", ","), (r"\.\.+", ",")]
    # Longest first: "don't" before "don". A rule's output has no letters, so no word is replaced
    # twice. A single letter after an apostrophe is an ending, not a word.
    for word in sorted(words, key=len, reverse=True):
        before = "" if len(word) > 1 else "(?<!')"
        rules.append((rf"{before}\b{word}\b", "".join(char[phone] for phone in words[word])))
    rules.append(("'s\\b", "'" + char["z"]))
    spelling = SpellingRules(
        {word: spoken for word, spoken in words.items() if len(word) > 1}, MIN_GAIN
    )
    for pattern, spoken in spelling.replacements():
        rules.append((pattern, "".join(char[phone] for phone in spoken) or SILENT))
    rules += [(SILENT, ""), ("'", ""), (r"\s+", " ")]
    rules += [(r" (?=[,.?!])", ""), (r"(?<=\]) ", ""), (r"[,.?!]*\?[,.?!]*", "?")]
    rules += [(r"(?<=[,.?!])[,.?!]+", ""), (r" $", "")]
    # A token's state knows only the text before it, and a frame mostly reads the token that sounds.
    # So a question is also marked before its last word.
    rules += [(r"(?<![^ \],])(?=[^ \],.?!]+\?)", "?")]
    alphabet = list("[]0123456789" + PUNCTUATION + LETTERS) + list(char.values())
    vocab = {token: i for i, token in enumerate(SPECIALS + alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
        + [normalizers.Replace(Regex(pattern), content) for pattern, content in rules]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIALS[0]} $A {SPECIALS[1]}",
        special_tokens=[(token, vocab[token]) for token in SPECIALS[:2]],
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIALS[:4]])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--words", type=int, default=32000)
    args = parser.parse_args()
    from hibari import Hibari

    frontend = Hibari()
    counts = word_counts(frontend.g2p.lexicon)
    forms = spoken_forms(frontend, corpus(60000)[:FORM_TEXTS])
    words: dict[str, list[str]] = {}
    # Rare words have phones that the voice would hardly learn. A voice that exists keeps its own.
    phones_path = args.run / "token_phones.txt"
    phones = phones_path.read_text().split("\n") if phones_path.exists() else []
    usual = set(phones)
    for word, _ in counts.most_common():
        if len(words) == args.words:
            break
        if not re.fullmatch("[a-z]+('[a-z]+)*", word) or (len(word) == 1 and word not in "ai"):
            continue
        spoken = word_phones(word, frontend, forms)
        if not phones and len(words) < USUAL_WORDS:
            usual.update(spoken or ())
        if spoken and usual.issuperset(spoken):
            words[word] = spoken
    for letter in set(string.ascii_uppercase) - {"A", "I"}:
        words[letter.lower()] = word_phones(letter, frontend, {})
    words["ay"] = ["ˈA"]  # the teacher reads a lone "A" as the article
    phones = phones or sorted(usual)
    tokenizer = build(words, phones)
    args.run.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.run / "tokenizer.json"), pretty=False)
    phones_path.write_text("\n".join(phones))
    text = [word for line in corpus(2000) for word in re.findall(r"[a-z']+", line.lower())]
    known = sum(word in words for word in text) / len(text)
    print(f"{len(phones)} phones ({STRESS} joined), {tokenizer.get_vocab_size()} tokens")
    print(f"{known:.1%} of the words of a sample of the training text are spelt in phones")


if __name__ == "__main__":
    main()
