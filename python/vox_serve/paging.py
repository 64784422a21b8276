"""Gives pages of the KV cache to requests as they grow, and takes them from others if none is left.

A request holds the pages of its prompt from its first step on, and gets another one whenever its
speech fills the last. A request that loses its pages keeps its row, with the codec's state. Later
its prompt and its own codes are prefilled: positions have the same bits, prefilled or decoded (see
docs/exactness.md), so it goes on as if nothing had happened.
"""

from collections.abc import Collection, Iterable

from vox_serve.frame_batch import FrameBatch
from vox_serve.kv_cache import PAGE_SIZE, KvCache
from vox_serve.live_request import LiveRequest
from vox_serve.model import CsmModel


class Paging:
    """Who holds pages.

    Args:
        cache: the pages, enough for one request of any length.
        batch: the rows of the requests that speak.
        model: makes inputs of codes.

    Attributes:
        num_losses: requests that lost their pages, since the start.
    """

    def __init__(self, cache: KvCache, batch: FrameBatch[LiveRequest], model: CsmModel) -> None:
        self._cache, self._batch, self._model = cache, batch, model
        self._lost: dict[LiveRequest, None] = {}
        self.num_losses = 0

    def reset(self) -> None:
        """Forget all requests; the cache and the batch are reset too."""
        self._lost.clear()

    def admit(self, live: LiveRequest, num_growing: int) -> bool:
        """Give a request the pages of its inputs, if there are some to spare.

        One page is left for each other request that may still grow, so that a newcomer does not
        take the pages of those who speak.

        Args:
            live: it holds no pages.
            num_growing: see `num_growing`.
        """
        has_begun = live.num_begun > 0
        if has_begun and not live.knows_inputs:
            return False
        if has_begun:
            live.extend_inputs(self._model)
        keys, length = live.inputs.keys, len(live.inputs.frames)
        # The last position of a prompt is computed, for its hidden state. One that has begun gets
        # room for the next position too, so that it makes a frame before it loses pages again.
        limit, count = (length, length + 1) if has_begun else (length - 1, length)
        needed = self._cache.num_needed_pages(keys, limit, count)
        if needed + num_growing > self._cache.num_free_pages:
            return False
        live.cache = self._cache.find(keys, limit)
        self._cache.reserve(live.cache, count - live.cache.length)
        live.holds_pages = True
        live.row.num_missing = live.num_missing
        if has_begun and not live.num_missing:
            self._batch.resume(live, live.cache)
        return True

    def num_growing(self, requests: Iterable[LiveRequest]) -> int:
        """The number of requests that hold pages and will need more."""
        return sum(
            live.holds_pages and len(live.cache.pages) * PAGE_SIZE < live.max_positions
            for live in requests
        )

    def restore(self, requests: Collection[LiveRequest]) -> bool:
        """Give pages back to the requests that lost theirs; False if there are not enough."""
        for live in sorted(self._lost, key=_keep_rank):
            if not self.admit(live, self.num_growing(requests)):
                return False
            del self._lost[live]
        return True

    def grow(
        self, active: Iterable[LiveRequest], requests: Collection[LiveRequest]
    ) -> list[LiveRequest]:
        """Give requests room for one more position, the first ones first.

        When no page is left, other requests lose theirs: whole answers, then those whose next frame
        is due last.

        Args:
            active: requests whose inputs are in the cache.
            requests: those that may lose their pages.

        Returns:
            Those of `active` that have the room: always the first, if any.
        """
        granted: dict[LiveRequest, None] = {}
        losers: list[LiveRequest] | None = None
        for live in active:
            if not live.holds_pages:
                continue
            if live.cache.length == len(live.cache.pages) * PAGE_SIZE:
                if losers is None and not self._cache.num_free_pages:
                    losers = [r for r in requests if r.holds_pages and not r.is_begun]
                    losers.sort(key=_keep_rank)
                while losers and not self._cache.num_free_pages:
                    if (loser := losers.pop()) is not live and loser not in granted:
                        self.suspend(loser)
                if not self._cache.num_free_pages:
                    continue
                self._cache.reserve(live.cache, 1)
                self._batch.append_page(live, len(live.cache.pages) - 1, live.cache.pages[-1])
            granted[live] = None
            live.cache.length += 1
        return list(granted)

    def suspend(self, live: LiveRequest) -> None:
        """Take a request's pages, until `restore`."""
        keys, length = live.lose_pages(self._model)
        self._cache.release(live.cache, keys, length)
        if live in self._batch:
            self._batch.suspend(live)
        self._lost[live] = None
        self.num_losses += 1

    def end(self, live: LiveRequest, keep: bool) -> None:
        """Free a request's row and pages; `keep` what is written for later requests."""
        self._lost.pop(live, None)
        if live in self._batch:
            self._batch.leave(live)
        if not live.holds_pages:
            return
        if keep:
            self._cache.release(live.cache, *live.written(self._model))
        else:
            self._cache.forget(live.cache)
            self._cache.release(live.cache)
        live.holds_pages = False


def _keep_rank(live: LiveRequest) -> tuple[bool, bool, float]:
    """Sorts requests: those that keep their pages for longest, or get them back, come first."""
    row = live.row
    return not row.streams, row.num_frames > 0, row.due_s if row.streams else -row.num_frames
