"""Places and a waiting line, shared fairly between clients: a data structure without a clock.

A free place goes to the client that holds the fewest places; among equals, to the one whose last
turn is longest ago. Spare places are only for clients that hold none: one client's long requests do
not make another client wait. Of a client's items that are ready, the first that came goes first. A
full line admits a newcomer only by evicting the newest waiting item of a client that holds clearly
more.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class LineFull(Exception):  # noqa: N818
    """The line is full, and nobody in it holds more than the newcomer's client."""


@dataclass
class _Share(Generic[Item]):
    """The items of one client. Dicts are sets that keep the order of arrival."""

    turn: float  # the take that served this client last
    waiting: dict[Item, None] = field(default_factory=dict)  # ready or not
    ready: set[Item] = field(default_factory=set)
    placed: dict[Item, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.placed)


class FairQueue(Generic[Item]):
    """A waiting line for places.

    Args:
        num_places: most items that hold a place.
        max_items: most items, placed and waiting together.
        num_spare: places beyond `num_places`, for clients without a place.
    """

    def __init__(self, num_places: int, max_items: int, num_spare: int = 0) -> None:
        self.num_places = num_places
        self.num_spare = num_spare
        self.max_items = max_items
        self.num_placed = 0
        self.num_waiting = 0
        self._shares: dict[str, _Share[Item]] = {}
        self._clients: dict[Item, str] = {}
        self._num_takes = 0

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, item: Item) -> bool:
        return item in self._clients

    def put(self, item: Item, client: str) -> Item | None:
        """Add an item that waits and is not ready yet.

        Returns:
            The item that was evicted to make room, if any.

        Raises:
            LineFull: there is no room, and no other client holds at least two items more.
        """
        evicted = None
        if len(self) >= self.max_items:
            evicted = self._find_victim(client)
            self.remove(evicted)
        # A new client comes before the one that was just served, after those that still wait.
        share = self._shares.setdefault(client, _Share(turn=self._num_takes - 0.5))
        share.waiting[item] = None
        self._clients[item] = client
        self.num_waiting += 1
        return evicted

    def mark_ready(self, item: Item) -> None:
        """Let a waiting item be taken. Unknown items are ignored."""
        client = self._clients.get(item)
        if client is not None and item in self._shares[client].waiting:
            self._shares[client].ready.add(item)

    @property
    def can_take(self) -> bool:
        """True if `take` would return an item."""
        return any(share.ready and self._has_place(share) for share in self._shares.values())

    def has_place(self, client: str) -> bool:
        """True if a place is free for an item of a client."""
        return self._has_place(self._shares.get(client) or _Share(turn=0))

    def _has_place(self, share: _Share[Item]) -> bool:
        spare = 0 if share.placed else self.num_spare
        return self.num_placed < self.num_places + spare

    def peek(self, accepts: Callable[[Item], bool] = lambda _: True) -> Item | None:
        """The first item in line that may get a place and is accepted."""
        shares = [
            share for share in self._shares.values() if share.ready and self._has_place(share)
        ]
        shares.sort(key=lambda share: (len(share.placed), share.turn))
        for share in shares:
            for item in share.waiting:
                if item in share.ready and accepts(item):
                    return item
        return None

    def take(self, item: Item | None = None) -> Item | None:
        """Give an item from `peek`, or else the first in line, a place; None if there is none."""
        item = self.peek() if item is None else item
        if item is None:
            return None
        share = self._shares[self._clients[item]]
        self._num_takes += 1
        share.turn = self._num_takes
        share.ready.remove(item)
        del share.waiting[item]
        share.placed[item] = None
        self.num_waiting -= 1
        self.num_placed += 1
        return item

    def num_ahead(self, client: str) -> int:
        """Waiting items that get a place before a new one of a client, if none leaves."""
        own = self._shares.get(client)
        length = len(own) if own else 0
        ahead = len(own.waiting) if own else 0
        for share in self._shares.values():
            if share is not own:
                ahead += min(len(share.waiting), max(0, length + 1 - len(share.placed)))
        return ahead

    def is_waiting(self, item: Item) -> bool:
        client = self._clients.get(item)
        return client is not None and item in self._shares[client].waiting

    def holds_one_place(self, item: Item) -> bool:
        """True if an item has the only place of its client."""
        return list(self._shares[self._clients[item]].placed) == [item]

    def remove(self, item: Item) -> None:
        """Take an item out of the line, or free its place. Unknown items are ignored."""
        client = self._clients.pop(item, None)
        if client is None:
            return
        share = self._shares[client]
        if item in share.placed:
            del share.placed[item]
            self.num_placed -= 1
        else:
            del share.waiting[item]
            share.ready.discard(item)
            self.num_waiting -= 1
        if not len(share):
            del self._shares[client]

    def remove_waiting(self) -> list[Item]:
        """Empty the line; placed items keep their places."""
        waiting = [item for share in self._shares.values() for item in share.waiting]
        for item in waiting:
            self.remove(item)
        return waiting

    def _find_victim(self, newcomer: str) -> Item:
        """The newest waiting item of the client that holds the most."""
        shares = [share for share in self._shares.values() if share.waiting]
        largest = max(shares, key=len, default=None)
        own = self._shares.get(newcomer)
        # An eviction must leave the victim's client no worse off than the newcomer's.
        if largest is None or len(largest) <= (len(own) if own else 0) + 1:
            raise LineFull
        return next(reversed(largest.waiting))
