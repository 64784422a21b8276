"""Prefills contexts while the engine has no request, for requests that will begin with them."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vox_serve.kv_cache import PAGE_SIZE, KvCache
from vox_serve.model import CsmModel
from vox_serve.prefill import Part, prefill
from vox_serve.request import Prompt
from vox_serve.step_times import StepTimes

STEP_S = 0.02
"""Target duration of a step. A request that arrives during a step waits for its end."""

MAX_CONTEXTS = 16
"""Most contexts. One more takes the place of the oldest one of the client that has the most."""


@dataclass(eq=False)
class _Context:
    """A context in line.

    Attributes:
        build, is_wanted: see `IdlePrefill.put`.
        is_building: a thread has taken it to build it.
        prompt: the result.
        num_done: positions that were in the cache after the last step.
    """

    build: Callable[[], Prompt]
    is_wanted: Callable[[], bool]
    is_building: bool = False
    prompt: Prompt | None = None
    num_done: int = 0


class IdlePrefill:
    """Contexts to prefill, oldest first. The results are kept in the prefix cache alone.

    Any thread may call `put`, `build_next` and `has_work`; the engine's thread makes the other
    calls.

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
        self._contexts: dict[tuple[str, str], _Context] = {}

    @property
    def has_work(self) -> bool:
        """True if `step` has something to do."""
        with self._lock:
            return any(context.prompt is not None for context in self._contexts.values())

    def put(
        self, client: str, key: str, build: Callable[[], Prompt], is_wanted: Callable[[], bool]
    ) -> None:
        """Put a context in line, if the cache can keep it.

        Args:
            client: whose context it is.
            key: the client's name for it; it replaces an earlier one of this name.
            build: makes the prompt; `build_next` calls it.
            is_wanted: asked before each step; False drops the context.
        """
        if not self._cache.max_cached_pages:
            return
        with self._lock:
            self._contexts.pop((client, key), None)
            if len(self._contexts) >= MAX_CONTEXTS:
                counts = Counter([client, *(owner for owner, _ in self._contexts)])
                most = max(counts[owner] for owner, _ in self._contexts)
                del self._contexts[next(k for k in self._contexts if counts[k[0]] == most)]
            self._contexts[client, key] = _Context(build, is_wanted)

    def build_next(self) -> bool:
        """Build the next prompt, which may take long; False if there is none to build.

        Raises:
            Exception: that of `build`; the context is dropped.
        """
        with self._lock:
            new = (c for c in self._contexts.values() if not c.is_building)
            if (context := next(new, None)) is None:
                return False
            context.is_building = True
        try:
            context.prompt = context.build()
        except BaseException:
            self._drop(context)
            raise
        return True

    def clear(self) -> None:
        """Drop all contexts."""
        with self._lock:
            self._contexts.clear()

    @torch.inference_mode()
    def step(self) -> None:
        """Prefill some positions of a context. The engine must have no request.

        Raises:
            Exception: the device failed; the context is dropped.
        """
        with self._lock:
            built = (c for c in self._contexts.values() if c.prompt is not None)
            context = next(built, None)
        if context is None:
            return
        goes_on = False
        try:
            goes_on = context.is_wanted() and self._advance(context)
        finally:
            if not goes_on:
                self._drop(context)

    def _drop(self, context: _Context) -> None:
        with self._lock:
            for key, other in self._contexts.items():
                if other is context:
                    del self._contexts[key]
                    return

    def _advance(self, context: _Context) -> bool:
        """Prefill some positions; False if none is left, or the cache does not keep them."""
        prompt = context.prompt
        assert prompt is not None
        length = min(len(prompt.frames), self._cache.max_positions)
        sequence = self._cache.find(prompt.keys, length)
        begin = end = sequence.length
        try:
            if begin == length or begin < context.num_done:
                return False
            num_tokens = self._times.tokens_within(STEP_S, self._chunk_tokens)
            end = (begin + max(num_tokens, PAGE_SIZE)) // PAGE_SIZE * PAGE_SIZE
            end = min(end, length)
            hidden = prefill(self._model, self._cache, [Part(prompt, sequence, end - begin)])
            if not hidden.isfinite().all():  # the last position sees all others
                end = begin
                return False
            self.num_positions += end - begin
            context.num_done = end
            return end < length
        except BaseException:
            end = begin
            raise
        finally:
            self._cache.release(sequence, prompt.keys, end)
