"""Who holds which page of the KV cache, and what unheld pages can be used for again."""

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor


class PrefixKeys:
    """A key for each prefix of a sequence of inputs: a hash of all of them up to there.

    Equal keys mean equal inputs, and so equal keys and values in the cache.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._keys = [self._hash.digest()]

    def extend(self, frames: Tensor, mask: Tensor) -> None:
        """Append inputs to the sequence.

        Args:
            frames: `[T, K + 1]` int64, the backbone's inputs.
            mask: `[T, K + 1]` bool, True where a column is used.
        """
        for row in torch.where(mask, frames, -1).int().numpy():
            self._hash.update(row)
            self._keys.append(self._hash.digest())

    def __getitem__(self, length: int) -> bytes:
        """The key of the first `length` inputs."""
        return self._keys[length]

    def copy(self) -> "PrefixKeys":
        copy = PrefixKeys()
        copy._hash, copy._keys = self._hash.copy(), self._keys.copy()
        return copy


class PagePool:
    """Counts the holders of each page. Pages that nobody holds are free, or cached by a key.

    Args:
        num_pages: pages in all.
        max_cached: most pages that are kept for their contents alone. Beyond that, and when no
            page is free, those that were not used for longest are given up.
    """

    def __init__(self, num_pages: int, max_cached: int) -> None:
        self.max_cached = max_cached
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_holders = [0] * num_pages
        self._keys: dict[int, bytes] = {}  # by page
        self._pages: dict[bytes, int] = {}  # by key
        self._cached: OrderedDict[int, None] = OrderedDict()  # unheld, the oldest first

    @property
    def num_available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def take(self) -> int:
        """A page for new contents.

        Raises:
            RuntimeError: all pages are held.
        """
        if not self._free:
            self._evict()
        page = self._free.pop()
        self._num_holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page with a key."""
        return self._pages.get(key)

    def is_held(self, page: int) -> bool:
        return self._num_holders[page] > 0

    def hold(self, page: int) -> None:
        """Add a holder to a page that is held or cached."""
        self._cached.pop(page, None)
        self._num_holders[page] += 1

    def drop(self, page: int) -> None:
        """Remove one of a page's holders; after the last one it is cached if it has a key."""
        self._num_holders[page] -= 1
        if self._num_holders[page]:
            return
        if page not in self._keys:
            self._free.append(page)
            return
        self._cached[page] = None
        if len(self._cached) > self.max_cached:
            self._evict()

    def name(self, page: int, key: bytes) -> None:
        """Give a key to a page that is held. If another page has it, that one counts as used."""
        other = self._pages.setdefault(key, page)
        if other == page:
            self._keys[page] = key
        elif other in self._cached:
            self._cached.move_to_end(other)

    def forget(self, page: int) -> None:
        """Remove the key of a page that is held."""
        if (key := self._keys.pop(page, None)) is not None:
            del self._pages[key]

    def _evict(self) -> None:
        if not self._cached:
            raise RuntimeError("the KV cache has no page left")
        page, _ = self._cached.popitem(last=False)
        self.forget(page)
        self._free.append(page)
