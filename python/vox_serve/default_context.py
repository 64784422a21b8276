"""The context of requests that have none of their own, whose keys and values stay in the cache."""

from collections.abc import Sequence

import torch

from vox_serve.kv_cache import PAGE_SIZE, CacheSequence, KvCache
from vox_serve.model import CsmModel
from vox_serve.prefill import Part, prefill
from vox_serve.prompt import PromptBuilder, PromptTooLongError, Segment
from vox_serve.request import Prompt


class DefaultContext:
    """Segments before every request that has no context of its own.

    Args:
        model: the two transformers.
        prompts: turns the segments into the model's input.
        segments: may be empty.

    Attributes:
        prompt: the model's input.

    Raises:
        PromptTooLongError: the segments leave no room for speech.
    """

    def __init__(
        self, model: CsmModel, prompts: PromptBuilder, segments: Sequence[Segment]
    ) -> None:
        self._model = model
        empty = torch.zeros(0, model.config.num_codebooks + 1, dtype=torch.int64)
        parts = prompts.build(segments) if segments else (empty, empty > 0)
        self.prompt = Prompt.build(*parts)
        self._sequence = CacheSequence()
        limit = model.config.backbone.max_positions
        if len(self.prompt.frames) >= limit:
            raise PromptTooLongError(
                f"the default context takes {len(self.prompt.frames)} positions of {limit}"
            )

    @property
    def num_pages(self) -> int:
        """Pages of its keys and values."""
        return -(-len(self.prompt.frames) // PAGE_SIZE)

    @torch.inference_mode()
    def fill(self, cache: KvCache, chunk_tokens: int) -> None:
        """Compute the keys and values, at most `chunk_tokens` at a time; they stay in the cache."""
        self._sequence = CacheSequence()
        while left := len(self.prompt.frames) - self._sequence.length:
            part = Part(self.prompt, self._sequence, min(left, chunk_tokens))
            prefill(self._model, cache, [part])
        cache.publish(self._sequence, self.prompt.keys, grows=False)

    def keep(self, cache: KvCache, chunk_tokens: int) -> None:
        """Let requests find it again, after a request that failed was forgotten.

        Only a fault of the device makes its own values bad.
        """
        if cache.is_finite(self._sequence):
            cache.publish(self._sequence, self.prompt.keys, grows=False)
        else:
            cache.forget(self._sequence)
            cache.release(self._sequence)
            self.fill(cache, chunk_tokens)
