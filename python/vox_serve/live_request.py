"""A request in the engine: what it has spoken, and its part of the KV cache."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vox_serve.ending import SilenceGuard
from vox_serve.kv_cache import CacheSequence
from vox_serve.model import CsmModel
from vox_serve.page_pool import PrefixKeys
from vox_serve.policy import Row
from vox_serve.request import Prompt, Request


@dataclass(eq=False)
class LiveRequest:
    """A request on its way through the engine.

    Attributes:
        request, prompt: as they were added.
        max_frames: most frames.
        silence: ends it if it falls silent.
        row: how the policy sees it.
        inputs: what its next frame needs in the cache: the prompt; after its pages were taken, also
            the frames that were fed back.
        max_positions: positions in the cache before the last frame, which is not fed back.
        cache: its pages, and the positions that are written there.
        holds_pages: False while it waits for pages.
        num_begun: frames given to the model.
        codes: of the frames that came back.
        ended: its further frames are discarded.
    """

    request: Request
    prompt: Prompt
    max_frames: int
    silence: SilenceGuard
    row: Row
    inputs: Prompt = field(init=False)
    max_positions: int = field(init=False)
    cache: CacheSequence = field(default_factory=CacheSequence)
    holds_pages: bool = False
    num_begun: int = 0
    codes: list[Tensor] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        self.inputs = self.prompt
        self.max_positions = len(self.prompt.frames) + self.max_frames - 1

    @property
    def num_missing(self) -> int:
        """Inputs that are not in the cache."""
        return max(0, len(self.inputs.frames) - self.cache.length)

    @property
    def is_begun(self) -> bool:
        """True if its last frame was given to the model."""
        return self.num_begun >= self.max_frames

    @property
    def knows_inputs(self) -> bool:
        """True if all frames that were fed back are known here."""
        return len(self.codes) >= self.num_begun - 1

    def written(self, model: CsmModel) -> tuple[PrefixKeys, int]:
        """Keys of the inputs that are in the cache, and the number of these, as far as known."""
        prompt = self._spoken(model, self.codes[: max(self.num_begun - 1, 0)])
        return prompt.keys, min(self.cache.length, len(prompt.frames))

    def lose_pages(self, model: CsmModel) -> tuple[PrefixKeys, int]:
        """Begin to wait for pages; returns keys and number of the inputs to publish."""
        keys, length = self.written(model)
        if len(self.codes) < self.num_begun:
            # The frame in flight may turn out to be no numbers: what it wrote is not published.
            length = min(length, len(self.prompt.frames) + max(len(self.codes) - 1, 0))
        self.holds_pages = False
        return keys, length

    def extend_inputs(self, model: CsmModel) -> None:
        """Make everything that was fed back part of the inputs, so that it is prefilled."""
        self.inputs = self._spoken(model, self.codes[: max(self.num_begun - 1, 0)])

    def _spoken(self, model: CsmModel, codes: list[Tensor]) -> Prompt:
        """The prompt and frames after it."""
        if not codes:
            return self.prompt
        return Prompt.build(*model.next_inputs(torch.stack(codes)), before=self.prompt)
