"""Prefills contexts while the engine has no request, for requests that will begin with them."""

import threading
from collections import Counter
from collections.abc import Callable

import torch

from vox_serve.kv_cache import PAGE_SIZE, KvCache
from vox_serve.model import CsmModel
from vox_serve.prefill import Part, prefill
from vox_serve.request import Prompt
from vox_serve.step_times import StepTimes

STEP_S = 0.02
"""Target duration of a step. A request that arrives during a step waits for its end."""

MAX_CONTEXTS = 16
"""Most contexts that wait. A further one takes the place of the oldest one of the client that has
the most."""


class IdlePrefill:
    """Contexts to prefill, oldest first. The results are kept in the prefix cache alone.

    Any thread may call `put` and `has_work`; the engine's thread makes the other calls.

    Args:
        model: the two transformers.
        cache: keeps the keys and values as it keeps those of requests.
        times: how long steps take.
        chunk_tokens: most tokens of a step.

    Attributes:
        num_positions: positions prefilled so far.
    """

    def __init__(
        self, model: CsmModel, cache: KvCache, times: StepTimes, chunk_tokens: int
    ) -> None:
        self._model, self._cache, self._times = model, cache, times
        self._chunk_tokens = chunk_tokens
        self.num_positions = 0
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, str], Callable[[], Prompt | None]] = {}
        self._prompt: Prompt | None = None
        self._num_done = 0  # positions of it

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or self._prompt is not None

    def put(self, client: str, key: str, build: Callable[[], Prompt | None]) -> None:
        """Put a context in line, if the cache can keep it.

        Args:
            client: whose context it is.
            key: the client's name for it; it replaces an earlier one of this name.
            build: makes the prompt, in a few milliseconds; None if nobody wants it any more.
        """
        if not self._cache.max_cached_pages:
            return
        with self._lock:
            self._waiting.pop((client, key), None)
            if len(self._waiting) >= MAX_CONTEXTS:
                counts = Counter(owner for owner, _ in self._waiting)
                most = max(counts.values())
                del self._waiting[next(k for k in self._waiting if counts[k[0]] == most)]
            self._waiting[client, key] = build

    def clear(self) -> None:
        """Drop all contexts."""
        with self._lock:
            self._waiting.clear()
        self._prompt = None

    @torch.inference_mode()
    def step(self) -> None:
        """Prefill some positions of a context. The engine must have no request.

        Raises:
            Exception: the prompt cannot be built, or the device failed; the context is dropped.
        """
        prompt, self._prompt = self._prompt, None
        if prompt is None:
            with self._lock:
                if not self._waiting:
                    return
                build = self._waiting.pop(next(iter(self._waiting)))
            if (prompt := build()) is None:
                return
            self._num_done = 0
        if self._advance(prompt):
            self._prompt = prompt

    def _advance(self, prompt: Prompt) -> bool:
        """Prefill some positions; False if none is left, or the cache does not keep them."""
        length = min(len(prompt.frames), self._cache.max_positions)
        sequence = self._cache.find(prompt.keys, length)
        begin = end = sequence.length
        try:
            if begin == length or begin < self._num_done:
                return False
            num_tokens = self._times.tokens_within(STEP_S, self._chunk_tokens)
            end = (begin + max(num_tokens, PAGE_SIZE)) // PAGE_SIZE * PAGE_SIZE
            end = min(end, length)
            hidden = prefill(self._model, self._cache, [Part(prompt, sequence, end - begin)])
            if not hidden.isfinite().all():  # the last position sees all others
                end = begin
                return False
            self.num_positions += end - begin
            self._num_done = end
            return end < length
        except BaseException:
            end = begin
            raise
        finally:
            self._cache.release(sequence, prompt.keys, end)
