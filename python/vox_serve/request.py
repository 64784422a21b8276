"""The engine's input and output types: requests, prompts, frames."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vox_serve.config import Normalise, random_seed
from vox_serve.page_pool import PrefixKeys
from vox_serve.part_feed import PartFeed
from vox_serve.prompt import PromptTooLongError as PromptTooLongError
from vox_serve.prompt import Segment
from vox_serve.request_id import current_id
from vox_serve.sampling import SamplingParams

FinishReason = Literal["stop", "length", "context", "silence", "error", "interrupted"]

_request_ids = itertools.count()


@dataclass(frozen=True)
class Request:
    """A text to speak, and how to speak it.

    Attributes:
        text: special tokens in it are plain text.
        speaker: 0 or more; the default voices are 0 and 1.
        context: earlier segments, oldest first; None for the engine's default context. A model
            that does not follow its context ignores them.
        sampling: how codes are drawn.
        max_frames: stop after this many frames of 80 ms; None for the engine's default.
        normalise: whether numbers, dates and the like become words; "auto" leaves it to the engine.
        id: unique among the live requests; begins with the id of the HTTP request that is served.
        drawn_seed: the seed if `sampling` gives none; drawn with the request, so that a request
            that is run again gets the same codes.
        streams: somebody listens while it is spoken.
        urgent: its client speaks nothing else, so that it goes before others that stream.
        speed: tempo at which the listener hears it, relative to the speech as it is made.
        feed: the parts of a text that is still being written, of which `text` is the first; None
            for a complete text. Only `LongForm` speaks further parts.
    """

    text: str
    speaker: int = 0
    context: Sequence[Segment] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_frames: int | None = None
    normalise: Normalise = "auto"
    id: str = field(default_factory=lambda: f"{current_id() or 'request'}-{next(_request_ids)}")
    drawn_seed: int = field(default_factory=random_seed, repr=False)
    streams: bool = False
    urgent: bool = False
    speed: float = 1.0
    feed: PartFeed | None = field(default=None, repr=False)

    @property
    def seed(self) -> int:
        """The seed of the request's draws."""
        return self.drawn_seed if self.sampling.seed is None else self.sampling.seed


class Prompt(NamedTuple):
    """A request's input to the backbone.

    Attributes:
        frames: `[T, K + 1]` int64, as returned by `PromptBuilder.build`.
        mask: `[T, K + 1]` bool.
        keys: the keys by which the cache knows its prefixes.
        parts: the texts of the utterances that `LongForm` speaks, of which the first is prepared.
    """

    frames: Tensor
    mask: Tensor
    keys: PrefixKeys
    parts: Sequence[str] = ()

    @classmethod
    def build(cls, frames: Tensor, mask: Tensor, before: "Prompt | None" = None) -> "Prompt":
        """A prompt of some inputs, after those of another prompt."""
        keys = before.keys.copy() if before else PrefixKeys()
        keys.extend(frames, mask)
        if before:
            frames = torch.cat([before.frames, frames])
            mask = torch.cat([before.mask, mask])
        return cls(frames, mask, keys)


class FrameOutput(NamedTuple):
    """One frame of one request, or the request's end.

    Attributes:
        request_id: the request's id.
        codes: `[K]` int64 on the CPU; None if the frame is a stop frame, which is not spoken, or
            could not be made.
        audio: float32 `[1920]`, in -1 to 1 or slightly beyond; None if `codes` is.
        finish_reason: None while more frames follow; "stop" if the model drew a stop frame,
            "length" at `max_frames`, "context" if the model's context is full, "silence" after too
            long a silence, "error" if the frame could not be made; only the server
            uses "interrupted".
        error: why the request ended with "error", or in the middle of a long text, for its client;
            None otherwise.
        part: index of the part of a long text; see `LongForm`.
        is_refused: the rest of a long text cannot be spoken; `error` says why.
        part_reason: finish reason of the part, if it ends here and its text is still being written.
    """

    request_id: str
    codes: Tensor | None
    audio: np.ndarray | None
    finish_reason: FinishReason | None
    error: str | None = None
    part: int = 0
    is_refused: bool = False
    part_reason: FinishReason | None = None
