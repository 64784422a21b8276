"""Continuous batching over frames: `add` requests, `step` one frame of each, `abort` any of them.

Requests join and leave between frames. The ops compute a row in the same order whatever else is in
the batch, and draws depend only on seed, frame and codebook. So a request gets the same codes
alone, in a batch, and however its prompt was cut into chunks.

A GPU works on one frame while the host handles the previous one. By the time the host sees that a
request has ended, the GPU has already begun one more frame of it, which is discarded.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vox_serve.ending import SilenceGuard
from vox_serve.frame_batch import FrameBatch, Frames
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache, copy_to_device
from vox_serve.mimi import Mimi
from vox_serve.model import CsmModel
from vox_serve.prompt import CHARS_PER_POSITION, PromptBuilder, Segment
from vox_serve.request import FinishReason, FrameOutput, Prompt, PromptTooLongError, Request
from vox_serve.text.normalising import normalise

PREFILL_CHUNK_TOKENS = {"cpu": 64, "cuda": 512}
"""Most prompt tokens in one step, by device type: few enough that a long prompt does not delay live
requests for long, enough to reuse each weight that is read."""

MAX_STEPS_SKIPPED = 8
"""Steps in which urgent prompts may come before a prompt, before it goes first."""

NOT_FINITE = "the model produced numbers that are not finite"
"""The error of a request whose hidden states, logits or audio hold NaN or infinity."""

FRAMES_AHEAD = {"cpu": 0, "cuda": 1}
"""Frames that may be in flight when `step` returns, by device type."""


@dataclass(eq=False)
class _Live:
    """A request that holds cache pages."""

    request: Request
    frames: Tensor  # the part of the prompt that is not in the cache yet, [T, K + 1]
    mask: Tensor
    cache: CacheSequence
    seed: int
    max_frames: int
    silence: SilenceGuard
    num_skipped: int = 0  # steps that prefilled only other prompts
    num_begun: int = 0  # frames given to the model
    num_frames: int = 0  # frames that came back
    ended: bool = False


class _Pending(NamedTuple):
    """A frame in flight, and the request of each of its rows."""

    members: list[_Live]
    frames: Frames


class Engine:
    """Turns requests into speech. Not thread-safe: one thread makes all calls except `prepare`.

    Args:
        model: the two transformers.
        mimi: the codec, on the model's device.
        prompts: turns text and context into the model's input.
        default_context: segments before every request that has no context of its own; their keys
            and values are computed once and shared.
        max_batch_size: most requests in a step; further ones wait in line.
        default_max_frames: `max_frames` of requests that set none; None for as many as the model's
            context has room for.
        max_silence_s: silence after which a request ends; 0 for no such end.
        num_spare_rows: further requests in a step, which `add` fills like the others. Who adds
            requests can keep these places for somebody who would otherwise wait.
        normalises: normalise the texts of requests that leave it to the engine.
    """

    def __init__(
        self,
        model: CsmModel,
        mimi: Mimi,
        prompts: PromptBuilder,
        default_context: Sequence[Segment] = (),
        max_batch_size: int = 8,
        default_max_frames: int | None = None,
        max_silence_s: float = 0.0,
        num_spare_rows: int = 0,
        normalises: bool = False,
    ) -> None:
        self.model = model
        self.mimi = mimi
        self.prompts = prompts
        self.max_batch_size = max_batch_size
        self.num_spare_rows = num_spare_rows
        self.default_max_frames = default_max_frames
        self.max_silence_s = max_silence_s
        self.normalises = normalises
        rows = max_batch_size + num_spare_rows
        # One sequence more than the live requests, for the shared prefix.
        self._cache = KvCache(model.config.backbone, rows + 1, model.dtype, model.device)
        self._default_context = tuple(default_context)
        self._batch: FrameBatch[_Live] = FrameBatch(model, mimi, self._cache, rows)
        self._pending: deque[_Pending] = deque()
        self._failed = False
        self._waiting: deque[_Live] = deque()
        self._live: dict[str, _Live] = {}
        self._prefix = self._fill_prefix()

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
        """Tokenize a request and check that it can be spoken. Any thread may call this.

        A long text takes a fraction of a second, and live requests should not wait for it.

        Raises:
            PromptTooLongError: the prompt leaves no room for a frame.
            ValueError: a field is out of range.
        """
        if request.max_frames is not None and request.max_frames < 1:
            raise ValueError(f"max_frames must be 1 or more, got {request.max_frames}")
        spoken = Segment(request.speaker, self.spoken_text(request))
        prompt = Prompt(*self.prompts.build([*(request.context or ()), spoken]))
        length, limit = self._num_positions(request, prompt), self._cache.max_positions
        if length >= limit:
            raise PromptTooLongError(
                f"the prompt takes {length} positions and must leave room for speech in the "
                f"model's context of {limit}"
            )
        return prompt

    def spoken_text(self, request: Request) -> str:
        """A request's text as the model reads it."""
        if request.normalise == "off" or not (request.normalise == "on" or self.normalises):
            return request.text
        if len(request.text) > CHARS_PER_POSITION * self.model.config.backbone.max_positions:
            return request.text  # `prepare` refuses it
        return normalise(request.text)

    def add(self, request: Request, prompt: Prompt | None = None) -> None:
        """Put a request in line.

        Args:
            request: the text to speak.
            prompt: the result of `prepare` for this request; None to prepare it here.

        Raises:
            ValueError: a live request has the same id; or see `prepare`.
        """
        if request.id in self._live or any(w.request.id == request.id for w in self._waiting):
            raise ValueError(f"id {request.id!r} is in use by a live request")
        prompt = prompt or self.prepare(request)
        max_frames = self._cache.max_positions - self._num_positions(request, prompt)
        if (limit := self._frame_limit(request)) is not None:
            max_frames = min(limit, max_frames)
        self._waiting.append(
            _Live(
                request,
                *prompt,
                CacheSequence(),
                request.seed,
                max_frames=max_frames,
                silence=SilenceGuard(self.max_silence_s),
            )
        )

    def abort(self, request_id: str) -> None:
        """Drop a waiting or live request and free its pages. Unknown ids are ignored."""
        if live := self._live.pop(request_id, None):
            self._end(live)
        self._waiting = deque(w for w in self._waiting if w.request.id != request_id)

    def reset(self) -> None:
        """Drop all requests and rebuild the state; the engine can serve again after a failed step.

        Pages are freed, the batch is emptied and the default context is computed again. Weights and
        CUDA graphs stay as they are. `prepare` may run in another thread meanwhile.

        Raises:
            RuntimeError: the device has failed; the engine then cannot serve.
        """
        self._failed = True
        for live in self._live.values():
            live.ended = True
        self._live.clear()
        self._waiting.clear()
        self._pending.clear()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # raises the error of any kernel in flight
        self._batch.reset()
        self._cache.reset()
        self._prefix = self._fill_prefix()
        self._failed = False

    @torch.inference_mode()
    def step(self) -> list[FrameOutput]:
        """Prefill some prompt tokens, and make one frame for each request whose prompt is complete.

        Returns:
            One output for each request that got a frame or ended. On a GPU outputs come one step
            late, so the list may be empty while requests are live.

        Raises:
            RuntimeError: an earlier step failed halfway, so the engine's state is inconsistent
                until `reset`.
        """
        if self._failed:
            raise RuntimeError("the engine failed in an earlier step")
        try:
            return self._step()
        except BaseException:
            self._failed = True
            raise

    def _step(self) -> list[FrameOutput]:
        self._admit()
        self._batch.step_backbone()
        self._prefill()
        ahead = 0
        if self._batch.members:
            self._begin_frames()
            ahead = FRAMES_AHEAD[self.model.device.type]
        outputs: list[FrameOutput] = []
        while len(self._pending) > ahead:
            outputs += self._finish_frames(self._pending.popleft())
        return outputs

    def _frame_limit(self, request: Request) -> int | None:
        """The frames after which a request ends with "length"; None for no limit."""
        return self.default_max_frames if request.max_frames is None else request.max_frames

    def _num_positions(self, request: Request, prompt: Prompt) -> int:
        """Positions that a prompt takes in the model's context, shared ones included."""
        shared = self._prefix.length if request.context is None else 0
        return shared + len(prompt.frames)

    def _admit(self) -> None:
        while self._waiting and len(self._live) < self.max_batch_size + self.num_spare_rows:
            live = self._waiting[0]
            if live.request.context is None:
                live.cache = self._cache.fork(self._prefix)
            self._live[live.request.id] = self._waiting.popleft()

    def _prefill(self) -> None:
        """Run the backbone over the next prompt tokens; completed prompts join the batch."""
        chosen, counts = self._next_prompts()
        if not chosen:
            return
        frames = torch.cat([live.frames[:n] for live, n in zip(chosen, counts, strict=True)])
        mask = torch.cat([live.mask[:n] for live, n in zip(chosen, counts, strict=True)])
        batch = CacheBatch.prefill(self._cache, [live.cache for live in chosen], counts)
        device = self.model.device
        inputs = copy_to_device(frames, device), copy_to_device(mask, device)
        hidden = self.model.backbone_step(*inputs, batch, self._cache)
        for row, live, count in zip(hidden, chosen, counts, strict=True):
            live.frames, live.mask = live.frames[count:], live.mask[count:]
            if len(live.frames) == 0:
                self._cache.reserve(live.cache, live.max_frames - 1)  # the last is not fed back
                self._batch.join(live, live.cache, live.request.sampling, live.seed, row)

    def _next_prompts(self) -> tuple[list[_Live], list[int]]:
        """The prompts of which this step prefills a part, and the tokens of each.

        Urgent prompts have the step to themselves, the shortest first. The others go in order of
        arrival. None is skipped for ever: see `MAX_STEPS_SKIPPED`.
        """
        left = [live for live in self._live.values() if len(live.frames)]
        first = [
            live for live in left if live.request.urgent or live.num_skipped >= MAX_STEPS_SKIPPED
        ]
        first.sort(key=lambda live: (live.num_skipped < MAX_STEPS_SKIPPED, len(live.frames)))
        budget = PREFILL_CHUNK_TOKENS[self.model.device.type]
        chosen: list[_Live] = []
        counts: list[int] = []
        for live in first or left:
            if budget:
                chosen.append(live)
                counts.append(min(budget, len(live.frames)))
                budget -= counts[-1]
        for live in left:
            live.num_skipped = 0 if live in chosen else live.num_skipped + 1
        return chosen, counts

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
            self._finish_frame(live, codes, audio, level)
            for live, codes, audio, level in zip(
                pending.members,
                pending.frames.codes,
                pending.frames.audio,
                pending.frames.levels(),
                strict=True,
            )
            if not live.ended
        ]

    def _finish_frame(self, live: _Live, codes: Tensor, audio: Tensor, level: float) -> FrameOutput:
        """Output a frame `[K]` and its samples, both on the CPU; end the request after its last.

        `level` is the root mean square of the samples; not finite if the frame is not.
        """
        if not math.isfinite(level):
            self.abort(live.request.id)
            return FrameOutput(live.request.id, None, None, "error", NOT_FINITE)
        if not codes.any():  # Sesame's stop frame, which is not spoken
            self.abort(live.request.id)
            return FrameOutput(live.request.id, None, None, "stop")
        live.num_frames += 1
        reason: FinishReason | None = None
        if live.num_frames == live.max_frames:
            is_limit = live.num_frames == self._frame_limit(live.request)
            reason = "length" if is_limit else "context"
        elif live.silence.is_over(level):
            reason = "silence"
        if reason:
            self.abort(live.request.id)
        # Copy: the rows are views of the whole batch's tensors, in memory that the GPU writes to.
        return FrameOutput(live.request.id, codes.clone(), audio.clone().numpy(), reason)

    def _end(self, live: _Live) -> None:
        live.ended = True
        if live in self._batch.members:
            self._batch.leave(live)
        self._cache.release(live.cache)

    @torch.inference_mode()
    def _fill_prefix(self) -> CacheSequence:
        """Compute the keys and values of the default context."""
        prefix = CacheSequence()
        if not self._default_context:
            return prefix
        frames, mask = self.prompts.build(self._default_context)
        if len(frames) >= self._cache.max_positions:
            raise PromptTooLongError(
                f"the default context takes {len(frames)} positions of {self._cache.max_positions}"
            )
        device = self.model.device
        chunk = PREFILL_CHUNK_TOKENS[device.type]
        for start in range(0, len(frames), chunk):
            part = slice(start, start + chunk)
            batch = CacheBatch.prefill(self._cache, [prefix], [len(frames[part])])
            self.model.backbone_step(
                frames[part].to(device), mask[part].to(device), batch, self._cache
            )
        return prefix
