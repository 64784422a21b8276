# ruff: noqa: SIM905 - word lists read better as text
"""The built-in voice's training texts and test sentences.

Training text is Debian's `wordnet-base` (example sentences of WordNet 3.0, whose licence allows any
use) mixed with novels in parts, everyday sentences built from templates, one- and two-word
utterances, numbers, names, times, pairs of sentences, and long sentences of joined clauses. No test
sentence is an instance of a training template, and training sentences that equal a test sentence
are dropped.
"""

import random
import re
from pathlib import Path

from novels import MAX_PART_CHARS, paragraphs
from vox_serve.text.splitting import split

WORDNET_FOLDER = Path("/usr/share/wordnet")

OFFENSIVE = re.compile(
    r"\b(fuck\w*|shit\w*|nigg\w*|cunts?|fag\w*|rap(e|ed|ist|ing)|whores?|sluts?|bitch\w*|kikes?"
    r"|spics?|bastards?|piss\w*|cocks?|tits?|sex\w*|prostitut\w*|jews?|negro\w*|queers?|suicid\w*"
    r"|murder\w*|kill\w*|penis|vagina\w*|nazi\w*|torture\w*|drunk\w*|corpse\w*|breasts?)\b",
    re.IGNORECASE,
)

WORDS = {
    "noun": (
        "dog cat house car table book river mountain city train bus station office garden window "
        "kitchen market school teacher doctor friend brother sister mother father child letter "
        "phone computer question answer story picture road bridge island forest field farmer "
        "painter driver player singer writer lake ship plane ticket hotel room bed chair lamp "
        "clock shoe coat hat shirt dress bag box bottle glass cup plate knife spoon apple orange "
        "egg cake camera message key wallet pencil paper basket ladder engine wheel tree flower "
        "bird horse farm village museum theatre hospital airport restaurant menu blanket mirror "
        "umbrella jacket suitcase package newspaper magazine poem song movie game puzzle lesson "
        "meeting report project budget contract invoice password account screen keyboard button"
    ).split(),
    "mass": (
        "coffee tea milk water juice soup bread cheese rice sugar salt butter honey music work "
        "money time help advice news snow sand paper luck patience homework furniture traffic"
    ).split(),
    "adjective": (
        "old new big small red blue green yellow white black long short warm cold dark bright "
        "quiet loud happy sad clean dirty heavy light fresh strange famous beautiful simple "
        "difficult important expensive cheap broken wooden friendly careful tall narrow wide "
        "round empty full soft hard smooth sweet bitter early late quick slow lucky brave gentle "
        "curious honest nervous polite clever tired hungry thirsty busy free ready wrong right"
    ).split(),
    "past": (
        "bought sold found lost saw opened closed painted cleaned carried moved fixed broke forgot "
        "remembered described wanted needed liked loved visited followed watched noticed borrowed "
        "returned finished started washed counted ordered delivered hid threw caught brought took "
        "drew built chose wore kept held left gave showed sent checked tested packed"
    ).split(),
    "verb": (
        "buy sell find lose see open close paint clean carry move fix forget remember describe "
        "want need like visit follow watch borrow return finish start wash count order deliver "
        "throw catch bring take draw build choose wear keep hold leave show send check test pack "
        "try share change cook read write sign save print"
    ).split(),
    "place": (
        "near the river|on the table|at the station|behind the house|in the garden|across the "
        "street|under the bridge|next to the bakery|in front of the school|at the airport|outside "
        "the theatre|on the third floor|by the lake|in the corner|above the shelf|down the road"
    ).split("|"),
    "when": (
        "in the morning|after lunch|before the meeting|on Monday|next week|last night|this "
        "evening|every day|at noon|until midnight|on Friday afternoon|in April|a year ago|in a few "
        "minutes|twice a month|all weekend|right now|as soon as possible|before breakfast|at dawn"
    ).split("|"),
    "name": (
        "Anna Peter Mary John Sarah David Emma Michael Laura James Linda Robert Alice Thomas Susan "
        "Daniel Helen Paul Julia Mark George Nancy Oliver Grace Henry Sophie Lucas Karen Brian Ruth"
    ).split(),
    "city": (
        "London Paris Boston Chicago Berlin Madrid Dublin Denver Toronto Sydney Tokyo Vienna Rome"
    ).split(),
    "number": (
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen eighteen twenty thirty forty fifty sixty seventy eighty ninety|twenty one|thirty "
        "two|forty five|fifty six|sixty seven|seventy eight|ninety nine|one hundred|two hundred"
        "|three thousand|one million"
    )
    .replace(" ", "|")
    .split("|"),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "month": (
        "January February March April May June July August September October November December"
    ).split(),
    "ordinal": "first second third fourth fifth sixth seventh eighth ninth tenth last next".split(),
    "weather": "rain snow wind fog thunder sunshine hail storms clouds frost".split(),
    "who": "I|you|we|they|he|she|my brother|your sister|the teacher|our neighbor|everyone".split(
        "|"
    ),
    "polite": "Please|Could you please|Kindly|Can you|Would you|Let us|You should|Do not".split(
        "|"
    ),
}
WORDS["number"] = [word for word in WORDS["number"] if word]

TEMPLATES = (
    "Where did you put the {noun}?|Would you like some {mass} with the {noun}?|How many {noun}s "
    "are there {place}?|What time does the {noun} open {when}?|Hello, this is {name} from the "
    "{noun}.|Hello {name}, nice to meet you.|My name is {name}, and I come from {city}.|I would "
    "like a {noun} and some {mass}.|My {noun} number is {number} {number} {number}.|The {noun} "
    "costs {number} dollars.|We will meet {place} {when}.|The {adjective} {noun} was {adjective} "
    "and {adjective}.|{name} {past} the {adjective} {noun} {when}.|She {past} {number} {noun}s and "
    "some {mass}.|They {past} the {noun} {place}.|He {past} my {noun} and {past} the {noun}.|The "
    "{noun} {place} has a {adjective} {noun}.|Tomorrow it will be {adjective}, with {weather} "
    "{when}.|There is {weather} in {city} {when}.|Your {noun} is {adjective}.|I think the {noun} "
    "is too {adjective} for the {noun}.|Welcome to the {noun}, {name}.|Good morning, {name}.|Good "
    "evening, everyone.|Goodbye, {name}, and good luck.|I am sorry, I do not understand.|I am "
    "sorry about the {noun}.|Let me know if you {verb} a {noun} {when}.|{polite} {verb} the "
    "{adjective} {noun}.|{polite} {verb} your {noun} {place}.|{polite} {verb} the {noun} {when}.|"
    "It is {number} minutes past {number}.|It is {number} o'clock.|The {ordinal} {noun} is "
    "{adjective}.|Her birthday is on the {ordinal} of {month}.|On {day}, {who} {past} a {noun}.|I "
    "can't {verb} the {noun}.|I don't {verb} {mass}.|We didn't {verb} it.|Why did {who} {verb} "
    "that {noun}?|When will {who} {verb} the {noun}?|Who {past} the {adjective} {noun}?|Is there "
    "any {mass} {place}?|Are you {adjective} {when}?|Have you ever {past} a {noun} in {city}?|"
    "{who} should {verb} it {when}.|If {who} {verb} the {noun}, we can {verb} the {noun}.|That's "
    "a {adjective} idea.|It's not {adjective}, it's {adjective}.|I'll {verb} it {when}, okay?|"
    "You're welcome.|Yes, of course.|No, thank you.|Thank you very much, {name}.|Excuse me, is "
    "this the {noun}?|Turn {adjective} {place}, then {verb} the {noun}.|There are {number} {noun}s "
    "and {number} {noun}s.|{number}, {number}, {number}, {number}.|{day}, {month} {number}.|The "
    "flight to {city} leaves {when}.|{name} and {name} live {place} in {city}.|What a {adjective} "
    "{noun}!|Be {adjective}, {name}!|How {adjective} is the {noun}?|{who} {past} {mass} {when}, "
    "but {who} {past} the {noun}.|{Because} the {noun} was {adjective}, {who} {past} {mass}."
).split("|")
WORDS["Because"] = ["Because", "While", "Although", "Before", "After", "Since"]

LONG_WORDS = (18, 32)
JOINTS = (
    ", and|, and|, and|, but|, but|, so|, or|, because| because|, while| while|, although| although"
    "|, then|, and then|, which is why| when| before| after|, as if| until|, even though| since|;|:"
).split("|")
OPENINGS = (
    "As far as I know,|In the end,|To be honest,|By the way,|For example,|On the other hand,|Of "
    "course,|After all,|I think that|They say that|We heard that|She told me that|It seems that|He "
    "said that|Do you know whether|I wonder why"
).split("|")
NAMES = {word for key in ("name", "city", "day", "month") for word in WORDS[key]}

# Written only for the test. The first is the README's example.
TEST_SENTENCES = """Please take the second door on the left.
Hello, this is a test of the speech system.
The quick brown fox jumps over the lazy dog.
My aunt makes the best chocolate cookies in town.
Please shut the door before it starts to get cold in here.
My uncle works for a small company near the harbor.
The express to London leaves at half past seven every morning.
We should get together next Tuesday and talk about the plan.
This hill has a wonderful view of the valley below.
Can you tell me how to get to the nearest bank?
He pushed the gate and walked slowly into the dark yard.
The children played football in the park until the sun went down.
I'd love a slice of pizza and a cold lemonade.
Scientists discovered a new kind of fish in the deep ocean.
Your parcel should arrive within five working days.
Today will be cloudy in the north and sunny in the south.
Thank you for calling, how may I help you?
The walls were decorated with photographs of the whole family.
Drinking enough water is important during the summer.
The library stays open late during the exams.
Listening to jazz always makes me feel happy.
What did you think of the concert yesterday?
Sorry I'm late, the traffic was terrible.
He has been learning to play the guitar for years.
We ran out of eggs, so I made pancakes without them.
Could I get the bill, please?
She laughed so hard that she almost fell off her chair.
Nobody knows what will happen after the election.
The baby is finally asleep, so keep your voice down.
A strong wind blew the leaves across the lawn.
Do you know whether the shops are open on Sunday?
The museum is free for students and children under twelve.
I forgot to charge my phone last night.
Everything will be all right in the end.
Their new apartment has two bedrooms and a balcony.
The doctor told him to get more sleep and less stress.
Remember to switch off the lights when you go home.
There's nothing better than fresh bread from the oven.
How long does it take to drive to the coast?
The company plans to hire fifty engineers this year.
They climbed for hours before they reached the summit.
Put the dishes in the sink and I will wash them later.
My favorite color has always been dark green.
The judge asked the witness to speak more clearly.
It rained so much that the streets were flooded.
Let's go for a walk along the beach after dinner.
The old man fed the pigeons in the square.
I have never seen so many stars in the sky.
Her speech was short, but everybody enjoyed it.
See you tomorrow at the usual place.""".split("\n")


def wordnet_sentences() -> list[str]:
    """Example sentences of 3 to 14 words, capitalised and ending with punctuation."""
    found = set()
    for part in ("noun", "verb", "adj", "adv"):
        file = WORDNET_FOLDER / f"data.{part}"
        for line in file.read_text(encoding="utf8", errors="ignore").splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            for quote in re.findall(r'"([^"]{12,110})"', line.split("|", 1)[1]):
                sentence = quote.strip(" ,;:")
                if not re.fullmatch(r"[A-Za-z ,.;:'!?-]+", sentence):
                    continue
                if not 3 <= len(sentence.split()) <= 14 or OFFENSIVE.search(sentence):
                    continue
                sentence = sentence[0].upper() + sentence[1:]
                found.add(sentence if sentence[-1] in ".!?" else sentence + ".")
    return sorted(found)


def everyday_sentence(rng: random.Random) -> str:
    """A sentence from a random template with random words in its slots."""
    sentence = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(WORDS[slot[1]]), rng.choice(TEMPLATES))
    return sentence[0].upper() + sentence[1:]


def short_utterance(rng: random.Random, sentences: list[str]) -> str:
    """One to three consecutive words of a random sentence: 'Bridge.', 'The heavy rain?'"""
    words = re.findall(r"[A-Za-z']+", rng.choice(sentences))
    count = min(rng.choice((1, 1, 2, 3)), len(words))
    start = rng.randrange(len(words) - count + 1)
    text = " ".join(words[start : start + count]).strip("'")
    return (text[:1].upper() + text[1:] + rng.choice(("", ".", ".", ".", "?", "!"))) or "Yes."


def novel_parts() -> list[str]:
    """Novels in parts, as the server cuts a long text."""
    texts = paragraphs()
    return [str(part) for text in texts for part in split(text, MAX_PART_CHARS, MAX_PART_CHARS)]


def as_clause(sentence: str) -> str:
    """The sentence without its full stop, and in lower case unless it begins with a name or I."""
    words = sentence.rstrip(".!?").split(" ")
    first = re.match(r"[A-Za-z]+", words[0])
    if first and first[0] not in NAMES | {"I"}:
        words[0] = words[0][0].lower() + words[0][1:]
    return " ".join(words)


def join_clauses(rng: random.Random, clause) -> str:
    """A sentence of at most LONG_WORDS words: what `clause()` returns, joined by conjunctions."""
    wanted = rng.randint(*LONG_WORDS)
    text = f"{rng.choice(OPENINGS)} " if rng.random() < 0.3 else ""
    text += as_clause(clause())
    for _ in range(40):
        more = f"{rng.choice(JOINTS)} {as_clause(clause())}"
        if len(text.split()) + len(more.split()) <= wanted:
            text += more
    asks = text.startswith("Do you")
    return text[0].upper() + text[1:] + ("?" if asks else rng.choice("......!?"))


def long_sentence(rng: random.Random, sentences: list[str]) -> str:
    """Clauses from WordNet's examples and from templates, joined to one sentence."""

    def clause():
        while True:
            text = rng.choice(sentences) if rng.random() < 0.5 else everyday_sentence(rng)
            if re.fullmatch(r"[^.!?]*\.", text) and len(text.split()) > 3:
                return text

    return join_clauses(rng, clause)


QUESTIONS = """
Are you coming home tonight?
Is the library open on Sunday?
Did he leave the keys at home?
Have you seen my brother?
Can we stay until Monday?
Is there any bread in the kitchen?
Do you like the new garden?
Was the train late again?
Will they meet us at the station?
Should I call her in the morning?
""".strip().splitlines()
"""Questions that English asks with a rise; STATEMENTS has the same words in another order."""

STATEMENTS = """
You are coming home tonight.
The library is open on Sunday.
He did leave the keys at home.
You have seen my brother.
We can stay until Monday.
There is bread in the kitchen.
You do like the new garden.
The train was late again.
They will meet us at the station.
I should call her in the morning.
""".strip().splitlines()


def long_test_sentences(count: int = 100) -> list[str]:
    """Sentences of 20 to 30 words, of clauses from the test sentences."""
    rng = random.Random(1)
    clauses = [text for text in TEST_SENTENCES if text.endswith(".")]
    found: list[str] = []
    while len(found) < count:
        text = join_clauses(rng, lambda: rng.choice(clauses))
        parts = [as_clause(clause).lower() for clause in clauses]
        repeats = any(text.lower().count(part) > 1 for part in parts)
        if 20 <= len(text.split()) <= 30 and text not in found and not repeats:
            found.append(text)
    return found


def corpus(count: int, seed: int = 0) -> list[str]:
    """`count` distinct training texts in random order, so that any prefix is a fair sample."""
    rng = random.Random(seed)
    sentences = wordnet_sentences()
    unused = sentences[:]
    rng.shuffle(unused)
    read_aloud = novel_parts()
    rng.shuffle(read_aloud)
    seen = {sentence.lower() for sentence in TEST_SENTENCES}
    texts: list[str] = []
    while len(texts) < count:
        kind = rng.random()
        if kind < 0.3 and read_aloud:
            text = read_aloud.pop()
        elif kind < 0.58 and unused:
            text = unused.pop()
        elif kind < 0.76:
            text = everyday_sentence(rng)
        elif kind < 0.82:
            text = short_utterance(rng, sentences)
        elif kind < 0.91:
            text = long_sentence(rng, sentences)
        else:
            text = f"{everyday_sentence(rng)} {rng.choice(sentences)}"
        if text.lower() not in seen:
            seen.add(text.lower())
            texts.append(text)
    return texts
