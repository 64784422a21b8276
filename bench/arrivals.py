"""Requests of a load: texts of mixed lengths, and the times at which they arrive.

All is drawn from seeds (numbers or texts), whatever the server does, so that servers can be
compared request by request.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

MIX = {"turn": 5, "sentences": 3, "paragraph": 2}
"""Kinds of text, and how many of each are in ten requests in a row."""
PARAGRAPH_CHARS = 390
"""Most characters of a paragraph: fewer than --split_chars, so that it is spoken in one part."""

OPENINGS = (
    *("Yes.", "No.", "Well,", "All right.", "I see.", "Sure.", "Hm,", "Of course.", "Look,"),
    *("Thanks.", "Oh,", "Fine.", "Right,", "Sorry,", "Good morning.", "So,", "Listen,", "Okay."),
)
TURNS = (
    "that sounds good to me.",
    "could you say that again?",
    "I will call you back in a minute.",
    "what time does it start?",
    "we can meet at the station.",
    "please wait a moment.",
    "I have no idea.",
    "let me check that for you.",
    "it is on the kitchen table.",
    "do you want some tea?",
    "nobody told me about it.",
    "that was a long day.",
    "I would rather stay at home.",
    "how was your trip?",
    "the parcel has arrived.",
    "turn left at the bridge.",
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Rain falls on the roof, and the lamp burns low.",
    "She said that the train would be late, so we walked along the river and talked.",
    "The old clock in the hall has not been wound since the summer.",
    "He opened the letter, read it twice, and put it back into the drawer.",
    "A narrow path leads from the village up to the lake.",
    "Most of the guests had left before the music began.",
    "We planted three apple trees last autumn, and one of them is already in bloom.",
    "The baker closes at noon on Saturdays.",
    "Nothing moved on the water except a small grey boat.",
    "My sister learnt to drive in a truck that was older than she was.",
    "If the weather holds, the bridge will be finished before the first snow.",
    "They painted the door green because there was no blue left.",
    "The lecture was about the history of paper, and it was better than it sounds.",
    "On the third day the fever went down, and he asked for soup.",
    "Every window in the street was dark but one.",
    "You will find the key under the second stone from the left.",
    "The committee will decide on Thursday, and the answer will come by post.",
    "A dog barked somewhere, and then it was quiet again.",
    "The shop sells bread, candles, string and very little else.",
)


@dataclass(frozen=True)
class Arrival:
    """A request of a load.

    Attributes:
        at_s: time from the start of the load; 0 where requests follow one another.
        text: to say.
        seed: of the speech.
        kind: of the text: a key of `MIX`, or a name of the scenario.
        streaming: the audio is sent as it is made.
    """

    at_s: float
    text: str
    seed: int
    kind: str
    streaming: bool = True


def text_of(kind: str, draw: random.Random) -> str:
    """A random text: one or two short turns, a few sentences, or a paragraph.

    Few texts of a load are equal, or the server would compute their prompts only once.
    """
    if kind == "turn":
        text = draw.choice(OPENINGS)
        for turn in draw.sample(TURNS, draw.randint(1, 2)):
            text += f" {turn if text.endswith(',') else turn[0].upper() + turn[1:]}"
        return text
    sentences = draw.sample(SENTENCES, draw.randint(2, 3) if kind == "sentences" else 10)
    text = sentences[0]
    for sentence in sentences[1:]:
        if kind == "paragraph" and len(text) + 1 + len(sentence) > PARAGRAPH_CHARS:
            break
        text += f" {sentence}"
    return text


def requests(seed: object) -> Iterator[Arrival]:
    """Requests without times, endlessly; each ten in a row hold the kinds of `MIX` exactly."""
    draw = random.Random(f"texts {seed}")
    for index in count(step=sum(MIX.values())):
        kinds = [kind for kind, share in MIX.items() for _ in range(share)]
        draw.shuffle(kinds)
        for offset, kind in enumerate(kinds):
            yield Arrival(0.0, text_of(kind, draw), index + offset, kind)


def at_times(times: list[float], seed: object) -> list[Arrival]:
    """The first requests of a seed at these times."""
    drawn = islice(requests(seed), len(times))
    return [replace(request, at_s=at_s) for at_s, request in zip(times, drawn, strict=True)]


def poisson(rate: float, seconds: float, seed: object) -> list[float]:
    """Times of a Poisson process of `rate` a second, up to `seconds`."""
    draw = random.Random(f"times {seed}")
    times, at_s = [], draw.expovariate(rate)
    while at_s < seconds:
        times.append(at_s)
        at_s += draw.expovariate(rate)
    return times


def bursts(rate: float, seconds: float, seed: object, size: int) -> list[float]:
    """Times of `rate` requests a second on average: bursts of `size` at once, which are Poisson."""
    return [at_s for at_s in poisson(rate / size, seconds, seed) for _ in range(size)]


def paragraphs(number: int, seed: object) -> list[Arrival]:
    """Long requests at time 0, each with a text of its own."""
    draw = random.Random(f"paragraphs {seed}")
    return [Arrival(0.0, text_of("paragraph", draw), index, "long") for index in range(number)]
