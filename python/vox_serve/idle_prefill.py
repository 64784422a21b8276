"""Prefills contexts while the engine has no request, for requests that will begin with them."""

from collections import OrderedDict

import torch

from vox_serve.kv_cache import PAGE_SIZE, KvCache
from vox_serve.model import CsmModel
from vox_serve.prefill import Part, prefill
from vox_serve.request import Prompt
from vox_serve.step_times import StepTimes

STEP_S = 0.02
"""A step lasts about so long: a request that comes meanwhile waits for its end."""

MAX_PROMPTS = 16
"""Most prompts that wait; beyond that the oldest is dropped."""


class IdlePrefill:
    """Prompts to prefill, the oldest first. The results stay in the prefix cache alone.

    Args:
        model: the two transformers.
        cache: keeps the keys and values, as long as it keeps those of requests.
        times: how long steps take.
        chunk_tokens: most tokens of a step.
    """

    def __init__(
        self, model: CsmModel, cache: KvCache, times: StepTimes, chunk_tokens: int
    ) -> None:
        self._model, self._cache, self._times = model, cache, times
        self._chunk_tokens = chunk_tokens
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()
        self._num_done = 0  # positions of the first prompt

    @property
    def has_work(self) -> bool:
        return bool(self._prompts)

    def put(self, key: str, prompt: Prompt) -> None:
        """Put a prompt in line.

        Args:
            key: whose prompt it is; it replaces an earlier one.
            prompt: to prefill.
        """
        self._drop(key)
        self._prompts[key] = prompt
        if len(self._prompts) > MAX_PROMPTS:
            self._drop(next(iter(self._prompts)))

    def clear(self) -> None:
        """Drop all prompts."""
        self._prompts.clear()
        self._num_done = 0

    @torch.inference_mode()
    def step(self) -> None:
        """Prefill some positions of the first prompt that has any to prefill."""
        while self._prompts:
            key, prompt = next(iter(self._prompts.items()))
            if self._step(prompt):
                return
            self._drop(key)

    def _step(self, prompt: Prompt) -> bool:
        """Prefill some positions; False if all are in the cache, or it has no room for them."""
        length = min(len(prompt.frames), self._cache.max_positions)
        sequence = self._cache.find(prompt.keys, length)
        begin = sequence.length
        num_tokens = self._times.tokens_within(STEP_S, self._chunk_tokens)
        end = max(begin + num_tokens, begin + PAGE_SIZE) // PAGE_SIZE * PAGE_SIZE
        end = min(end, length)
        num_pages = -(-end // PAGE_SIZE) - len(sequence.pages)
        has_room = begin >= self._num_done and num_pages <= self._cache.num_free_pages
        if begin == length or not has_room:
            self._cache.release(sequence, prompt.keys, begin)
            return False
        hidden = prefill(self._model, self._cache, [Part(prompt, sequence, end - begin)])
        if not hidden.isfinite().all():  # each position sees all before it
            self._cache.forget(sequence)
            self._cache.release(sequence)
            return False
        self._cache.release(sequence, prompt.keys, end)
        self._num_done = end
        return True

    def _drop(self, key: str) -> None:
        if key == next(iter(self._prompts), None):
            self._num_done = 0
        self._prompts.pop(key, None)
