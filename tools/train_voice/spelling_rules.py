"""Rules from letters to phones, for words that are not in the tokenizer's dictionary.

A rule replaces a group of letters, at any place, at the start or at the end of a word, by phones.
Rules are applied in order, the longest group first, and phones are no letters, so no letter is read
twice: a list of `Replace` rules can do it. They are learnt from the dictionary: its letters and
phones are aligned, and a longer group becomes a rule where it is right much more often than the
shorter groups within it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

MAX_GROUP = 6  # letters
ROUNDS = 5  # of alignment
MAX_PHONES = 2  # of one letter
UNSEEN_COST = 12.0
START, END = "<", ">"

Phones = tuple[str, ...]


class SpellingRules:
    """Learns from words and their phones.

    Args:
        words: the dictionary.
        min_gain: a group becomes a rule if it mends at least so many words.
    """

    def __init__(self, words: dict[str, list[str]], min_gain: int = 6):
        aligned = align({word: tuple(phones) for word, phones in words.items() if word.isalpha()})
        readings: dict[str, Counter[Phones]] = defaultdict(Counter)
        for word, parts in aligned:
            letters = START + word + END
            parts = ((), *parts, ())
            for start in range(len(letters)):
                for end in range(start + 1, min(start + MAX_GROUP, len(letters)) + 1):
                    group = letters[start:end]
                    readings[group][sum(parts[start:end], ())] += 1
        self.rules: dict[str, Phones] = {}  # group, with START or END where it must lie there
        for group in sorted(readings, key=lambda g: (len(g), g)):
            if group in (START, END):
                continue
            (best, count), known = readings[group].most_common(1)[0], self._read(group)
            if len(group) == 1 or (best != known and count - readings[group][known] >= min_gain):
                self.rules[group] = best

    def read(self, word: str) -> Phones:
        """A word's phones."""
        return self._read(START + word + END)

    def _read(self, letters: str) -> Phones:
        matches = []
        for start in range(len(letters)):
            for end in range(start + 1, min(start + MAX_GROUP, len(letters)) + 1):
                if letters[start:end] in self.rules:
                    matches.append((*_order(letters[start:end]), start, end))
        parts: dict[int, Phones] = {}
        used: set[int] = set()
        for _, group, start, end in sorted(matches):
            inner = [i for i in range(start, end) if letters[i] not in (START, END)]
            if used.isdisjoint(inner):
                used.update(inner)
                parts[start] = self.rules[group]
        return sum((parts[start] for start in sorted(parts)), ())

    def replacements(self) -> Iterable[tuple[str, Phones]]:
        """Regular expressions and their phones, in order. They take all private characters for
        phones."""
        inside = "[a-z\ue000-\uf8ff]"
        for group in sorted(self.rules, key=_order):
            before = f"(?<!{inside})" if group[0] == START else ""
            after = f"(?!{inside})" if group[-1] == END else ""
            yield f"{before}{group.strip(START + END)}{after}", self.rules[group]


def _order(group: str) -> tuple[int, str]:
    return -len(group), group


def align(words: dict[str, Phones]) -> list[tuple[str, list[Phones]]]:
    """Each letter's phones, none to MAX_PHONES, in the likeliest way; words with more phones than
    that are left out."""
    together: Counter[tuple[str, str]] = Counter()
    letters, phones = Counter[str](), Counter[str]()
    for word, spoken in words.items():
        together.update((a, b) for a in set(word) for b in set(spoken))
        letters.update(set(word))
        phones.update(set(spoken))

    def first_cost(letter: str, part: Phones) -> float:
        if not part:
            return 2.5
        shares = [2 * together[letter, p] / (letters[letter] + phones[p]) for p in part]
        return sum(-math.log(share + 1e-3) for share in shares) + 2 * (len(part) - 1)

    cost = first_cost
    for _ in range(ROUNDS):
        aligned = [(word, parts) for word, p in words.items() if (parts := _best(word, p, cost))]
        counts = Counter(
            (a, part) for word, parts in aligned for a, part in zip(word, parts, strict=True)
        )
        cost = _costs(counts)
    return aligned


def _costs(counts: Counter[tuple[str, Phones]]) -> Callable[[str, Phones], float]:
    sums = Counter[str]()
    for (letter, _), count in counts.items():
        sums[letter] += count
    costs = {key: -math.log(count / sums[key[0]]) for key, count in counts.items()}
    return lambda letter, part: costs.get((letter, part), UNSEEN_COST)


def _best(word: str, phones: Phones, cost: Callable[[str, Phones], float]) -> list[Phones] | None:
    """The cheapest way to give the phones to the letters, in order."""
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # by phones used: cost, of these
    for letter in word:
        row: dict[int, tuple[float, int]] = {}
        for used, (total, _) in best[-1].items():
            for count in range(min(MAX_PHONES, len(phones) - used) + 1):
                new = total + cost(letter, phones[used : used + count])
                if used + count not in row or new < row[used + count][0]:
                    row[used + count] = (new, count)
        best.append(row)
    if len(phones) not in best[-1]:
        return None
    parts, used = [], len(phones)
    for row in reversed(best[1:]):
        count = row[used][1]
        parts.append(phones[used - count : used])
        used -= count
    return parts[::-1]
