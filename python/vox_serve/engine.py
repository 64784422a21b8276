"""Continuous batching over frames: `add` requests, `step` one frame of each, `abort` any.

Requests join and leave between frames. The ops compute a row in the same order whatever else is in
the batch, and draws depend on seed, frame and codebook alone; so a request gets the same codes
alone, in a batch, and however its prompt was cut into chunks.

A GPU works on one frame while the host looks at the one before. A request that turns out to have
ended there was given a frame too many, which nobody hears of.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vox_serve.config import DEFAULT_MAX_FRAMES
from vox_serve.frame_batch import FrameBatch, Frames
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache, send
from vox_serve.mimi import Mimi
from vox_serve.model import CsmModel
from vox_serve.prompt import PromptBuilder, Segment
from vox_serve.sampling import SamplingParams

PREFILL_CHUNK_TOKENS = {"cpu": 64, "cuda": 512}
"""Prompt tokens in one step, by device: so few that a long prompt keeps no live request waiting for
long, enough to make use of each weight that is read."""

FRAMES_AHEAD = {"cpu": 0, "cuda": 1}
"""Frames that are begun before the last one is looked at, by device."""

FinishReason = Literal["stop", "length", "context"]

_request_ids = itertools.count()


class PromptTooLongError(ValueError):
    """The prompt leaves no room for a frame in the model's context."""


@dataclass(frozen=True)
class Request:
    """What to say, and how.

    Attributes:
        text: spoken as it is; special tokens in it are text.
        speaker: 0 or more; the default voices are 0 and 1.
        context: earlier segments, oldest first; None for the engine's default context.
        sampling: how codes are drawn.
        max_frames: stop after so many, 80 ms each; None for `DEFAULT_MAX_FRAMES`.
        id: unique among the live requests.
    """

    text: str
    speaker: int = 0
    context: Sequence[Segment] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_frames: int | None = None
    id: str = field(default_factory=lambda: f"request-{next(_request_ids)}")


class Prompt(NamedTuple):
    """A request's input to the backbone, without the engine's shared default context.

    Attributes:
        frames: `[T, K + 1]` int64, as `PromptBuilder.build` gives them.
        mask: `[T, K + 1]` bool.
    """

    frames: Tensor
    mask: Tensor


class FrameOutput(NamedTuple):
    """One frame of one request, or its end.

    Attributes:
        request_id: whose.
        codes: `[K]` int64 on the CPU; None where the frame ends the utterance and is not spoken.
        audio: float32 `[1920]`, in -1 to 1 or slightly beyond; None like `codes`.
        finish_reason: None while more will come; "stop" by the model's own word, "length" at
            `max_frames`, "context" where the model's context is full.
    """

    request_id: str
    codes: Tensor | None
    audio: np.ndarray | None
    finish_reason: FinishReason | None


@dataclass(eq=False)
class _Live:
    """A request that holds cache pages."""

    request: Request
    frames: Tensor  # the prompt's part that is not yet in the cache, [T, K + 1]
    mask: Tensor
    cache: CacheSequence
    seed: int
    max_frames: int
    num_begun: int = 0  # frames that were asked of the model
    num_frames: int = 0  # those that came back
    ended: bool = False


class _Pending(NamedTuple):
    """A frame that was begun, and whose rows are."""

    members: list[_Live]
    frames: Frames


class Engine:
    """Runs requests to speech. Not thread-safe: one thread calls all of it but `prepare`.

    Args:
        model: the two transformers.
        mimi: the codec, on the model's device.
        prompts: text and context to the model's input.
        default_context: segments before every request that brings none of its own; their keys
            and values are computed once and shared.
        max_batch_size: requests that share a step; more wait in line.
    """

    def __init__(
        self,
        model: CsmModel,
        mimi: Mimi,
        prompts: PromptBuilder,
        default_context: Sequence[Segment] = (),
        max_batch_size: int = 8,
    ):
        self.model = model
        self.mimi = mimi
        self.prompts = prompts
        self.max_batch_size = max_batch_size
        # One sequence more than live requests can fill, for the shared prefix.
        self._cache = KvCache(model.config.backbone, max_batch_size + 1, model.dtype, model.device)
        self._default_context = tuple(default_context)
        self._prefix = CacheSequence()
        self._batch = FrameBatch(model, mimi, self._cache, max_batch_size)
        self._pending: deque[_Pending] = deque()
        self._failed = False
        self._waiting: deque[_Live] = deque()
        self._live: dict[str, _Live] = {}
        if self._default_context:
            self._fill_prefix()

    @property
    def num_codebooks(self) -> int:
        return self.model.config.num_codebooks

    @property
    def sample_rate_hz(self) -> int:
        return self.mimi.config.sample_rate_hz

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._waiting)

    def prepare(self, request: Request) -> Prompt:
        """Tokenize a request and check that it can be spoken. Any thread may call it.

        A long text takes a fraction of a second, which live requests need not wait for.

        Raises:
            PromptTooLongError: the prompt leaves no room for a frame.
            ValueError: a field is out of its range.
        """
        if request.max_frames is not None and request.max_frames < 1:
            raise ValueError(f"max_frames must be 1 or more, got {request.max_frames}")
        spoken = Segment(request.speaker, request.text)
        prompt = Prompt(*self.prompts.build([*(request.context or ()), spoken]))
        length, limit = self._num_positions(request, prompt), self._cache.max_positions
        if length >= limit:
            raise PromptTooLongError(
                f"the prompt takes {length} positions and must leave room for speech in the "
                f"model's context of {limit}"
            )
        return prompt

    def add(self, request: Request, prompt: Prompt | None = None) -> None:
        """Put a request in line.

        Args:
            request: what to say.
            prompt: what `prepare` gave for it; None to prepare it here.

        Raises:
            ValueError: a live request has this id; or see `prepare`.
        """
        if request.id in self._live or any(w.request.id == request.id for w in self._waiting):
            raise ValueError(f"id {request.id!r} is in use by a live request")
        prompt = prompt or self.prepare(request)
        room = self._cache.max_positions - self._num_positions(request, prompt)
        self._waiting.append(
            _Live(
                request,
                *prompt,
                CacheSequence(),
                request.sampling.resolved_seed(),
                max_frames=min(request.max_frames or DEFAULT_MAX_FRAMES, room),
            )
        )

    def abort(self, request_id: str) -> None:
        """Drop a request, waiting or live, and free its pages; unknown ids are ignored."""
        if live := self._live.pop(request_id, None):
            self._end(live)
        self._waiting = deque(w for w in self._waiting if w.request.id != request_id)

    @torch.inference_mode()
    def step(self) -> list[FrameOutput]:
        """Prefill some prompt tokens, and make one frame for every request whose prompt is in.

        Returns:
            One output for each request that got a frame or ended. On a GPU they are one step late:
            while requests are live there may be none.

        Raises:
            RuntimeError: an earlier step failed halfway; nothing here is to be relied on.
        """
        if self._failed:
            raise RuntimeError("the engine failed in an earlier step")
        self._failed = True
        self._admit()
        self._batch.step_backbone()
        self._prefill()
        ahead = 0
        if self._batch.members:
            self._begin_frames()
            ahead = FRAMES_AHEAD[self.model.device.type]
        outputs = []
        while len(self._pending) > ahead:
            outputs += self._finish_frames(self._pending.popleft())
        self._failed = False
        return outputs

    def _num_positions(self, request: Request, prompt: Prompt) -> int:
        """Positions of the context that the prompt takes, with what it shares."""
        shared = self._prefix.length if request.context is None else 0
        return shared + len(prompt.frames)

    def _admit(self) -> None:
        while self._waiting and len(self._live) < self.max_batch_size:
            live = self._waiting[0]
            if live.request.context is None:
                live.cache = self._cache.fork(self._prefix)
            self._live[live.request.id] = self._waiting.popleft()

    def _prefill(self) -> None:
        """Feed the backbone the next prompt tokens; whose prompt is all in joins the batch."""
        budget = PREFILL_CHUNK_TOKENS[self.model.device.type]
        chosen, counts = [], []
        for live in self._live.values():
            if len(live.frames) and budget:
                chosen.append(live)
                counts.append(min(budget, len(live.frames)))
                budget -= counts[-1]
        if not chosen:
            return
        frames = torch.cat([live.frames[:n] for live, n in zip(chosen, counts, strict=True)])
        mask = torch.cat([live.mask[:n] for live, n in zip(chosen, counts, strict=True)])
        batch = CacheBatch.prefill(self._cache, [live.cache for live in chosen], counts)
        device = self.model.device
        inputs = send(frames, device), send(mask, device)
        hidden = self.model.backbone_step(*inputs, batch, self._cache)
        for row, live, count in zip(hidden, chosen, counts, strict=True):
            live.frames, live.mask = live.frames[count:], live.mask[count:]
            if len(live.frames) == 0:
                self._cache.reserve(live.cache, live.max_frames - 1)  # the last is not fed back
                self._batch.join(live, live.cache, live.request.sampling, live.seed, row)

    def _begin_frames(self) -> None:
        members = list(self._batch.members)
        self._pending.append(_Pending(members, self._batch.draw_frames()))
        for live in members:
            live.num_begun += 1
            if live.num_begun == live.max_frames:
                self._batch.leave(live)

    def _finish_frames(self, pending: _Pending) -> list[FrameOutput]:
        pending.frames.wait()
        return [
            self._finish_frame(live, codes, audio)
            for live, codes, audio in zip(
                pending.members, pending.frames.codes, pending.frames.audio, strict=True
            )
            if not live.ended
        ]

    def _finish_frame(self, live: _Live, codes: Tensor, audio: Tensor) -> FrameOutput:
        """A frame `[K]` with its samples, on the CPU; see whether it is the last."""
        if not codes.any():  # Sesame's stop rule; the frame is not spoken
            self.abort(live.request.id)
            return FrameOutput(live.request.id, None, None, "stop")
        live.num_frames += 1
        reason = None
        if live.num_frames == live.max_frames:
            wanted = live.request.max_frames or DEFAULT_MAX_FRAMES
            reason = "length" if live.num_frames == wanted else "context"
            self.abort(live.request.id)
        # Copies: the rows are views of the whole batch's, in memory that the GPU writes to.
        return FrameOutput(live.request.id, codes.clone(), audio.clone().numpy(), reason)

    def _end(self, live: _Live) -> None:
        live.ended = True
        if live in self._batch.members:
            self._batch.leave(live)
        self._cache.release(live.cache)

    @torch.inference_mode()
    def _fill_prefix(self) -> None:
        frames, mask = self.prompts.build(self._default_context)
        if len(frames) >= self._cache.max_positions:
            raise PromptTooLongError(
                f"the default context takes {len(frames)} positions of {self._cache.max_positions}"
            )
        device = self.model.device
        chunk = PREFILL_CHUNK_TOKENS[device.type]
        for start in range(0, len(frames), chunk):
            part = slice(start, start + chunk)
            batch = CacheBatch.prefill(self._cache, [self._prefix], [len(frames[part])])
            self.model.backbone_step(
                frames[part].to(device), mask[part].to(device), batch, self._cache
            )
