"""The conversations of a cluster: where each one is, and its newest state.

One process of the cluster has the directory (see `keeper.py`). A conversation belongs to one
replica at a time, which saves it here after each turn. Another replica takes it over when its owner
has released it or is gone.
"""

import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

GRACE_S = 5.0
"""A directory that has just begun waits so long for the replicas to tell it what they have."""

CLAIM_S = 60.0
"""A key that a replica has asked for is free again if it has saved nothing for so long."""

MAX_CLAIMED = 10_000
"""Most keys that replicas have asked for and that nobody has saved yet."""

Key = tuple[str, str]
"""A client, and its name for a conversation."""

State = dict[str, Any]


@dataclass
class Entry:
    """A conversation.

    Attributes:
        owner: the address of the replica that has it.
        state: its newest state.
        used_s: time of its last use.
    """

    owner: Sequence[Any]
    state: State
    used_s: float


@dataclass(frozen=True)
class Claim:
    """The answer to a replica that wants a conversation.

    Attributes:
        owner: the address of the replica that has it now; None if the asker should ask again.
        state: what was saved, if the asker has it now.
    """

    owner: Sequence[Any] | None
    state: State | None = None


class Directory:
    """The conversations of all replicas. One thread uses it.

    Args:
        max_number: most conversations; beyond that the client with the most loses the one that was
            not used for longest.
        idle_s: time without use after which one is forgotten.
        clock: the time in seconds.

    Attributes:
        epoch: another one for each directory: it begins empty.
    """

    def __init__(
        self, max_number: int, idle_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.epoch = secrets.token_hex(8)
        self._max_number, self._idle_s, self._clock = max_number, idle_s, clock
        self._begun_s = clock()
        self._entries: OrderedDict[Key, Entry] = OrderedDict()  # the longest unused one first
        self._counts: Counter[str] = Counter()  # by client
        # Nothing is saved yet: who may begin it, and since when. The oldest first.
        self._claimed: OrderedDict[Key, tuple[Sequence[Any], float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def claim(self, key: Key, asker: Sequence[Any], instead_of: Sequence[Any] | None) -> Claim:
        """Make a replica the owner of a conversation that nobody has, or that its owner gave up.

        Args:
            key: of the conversation.
            asker: address of the replica.
            instead_of: the owner that has released it or is gone.
        """
        self._expire()
        entry = self._entries.get(key)
        if entry is None:
            if self._clock() - self._begun_s < GRACE_S:
                return Claim(None)
            return Claim(self._claim_new(key, asker, instead_of))
        if tuple(entry.owner) not in (tuple(asker), tuple(instead_of or ())):
            return Claim(entry.owner)
        entry.owner = asker
        self._touch(key)
        return Claim(asker, entry.state)

    def _claim_new(
        self, key: Key, asker: Sequence[Any], instead_of: Sequence[Any] | None
    ) -> Sequence[Any]:
        """The replica that may begin a conversation: the first that asked, until it releases it.
        Without this two replicas often both began it. They still may if the first one asks again
        between its release and the second one's claim; one of the two turns is lost then."""
        first, _ = self._claimed.get(key, (asker, 0.0))
        if tuple(first) not in (tuple(asker), tuple(instead_of or ())):
            return first
        self._claimed[key] = asker, self._clock()
        self._claimed.move_to_end(key)
        if len(self._claimed) > MAX_CLAIMED:
            self._claimed.popitem(last=False)
        return asker

    def save(self, key: Key, owner: Sequence[Any], state: State | None) -> bool:
        """Keep a conversation's state, or forget it.

        Args:
            key: of the conversation.
            owner: address of the replica that has it.
            state: the state; None for a conversation that was deleted.

        Returns:
            False if it belongs to another replica, or another one may begin it.
        """
        self._expire()
        entry = self._entries.get(key)
        holder = entry.owner if entry else self._claimed.get(key, (owner, 0.0))[0]
        if tuple(holder) != tuple(owner):
            return False
        self._claimed.pop(key, None)
        if state is None:
            if entry is not None:
                self._forget(key)
            return True
        if entry is None:
            self._counts[key[0]] += 1
        self._entries[key] = Entry(owner, state, 0.0)
        self._touch(key)
        if len(self._entries) > self._max_number:
            largest = max(self._counts, key=self._counts.__getitem__)
            self._forget(next(key for key in self._entries if key[0] == largest))
        return True

    def _touch(self, key: Key) -> None:
        self._entries[key].used_s = self._clock()
        self._entries.move_to_end(key)

    def _expire(self) -> None:
        begun = self._clock() - CLAIM_S
        while self._claimed and next(iter(self._claimed.values()))[1] < begun:
            self._claimed.popitem(last=False)
        limit = self._clock() - self._idle_s
        while self._entries and next(iter(self._entries.values())).used_s < limit:
            self._forget(next(iter(self._entries)))

    def _forget(self, key: Key) -> None:
        del self._entries[key]
        self._counts[key[0]] -= 1
        if not self._counts[key[0]]:
            del self._counts[key[0]]
