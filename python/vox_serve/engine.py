"""Continuous batching over frames: `add` requests, `step` one frame of each, `abort` any of them.

Requests join and leave between frames. The ops compute a row in the same order whatever else is in
the batch, and draws depend only on seed, frame and codebook. So a request gets the same codes
alone, in a batch, and however its prompt was cut into chunks.

What a prompt has in common with earlier prompts and with the speech that followed them is found in
the KV cache, and not computed again.

A GPU works on one frame while the host handles the previous one. By the time the host sees that a
request has ended, the GPU has already begun one more frame of it, which is discarded.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vox_serve.ending import SilenceGuard
from vox_serve.frame_batch import FrameBatch, Frames
from vox_serve.kv_cache import (
    PAGE_SIZE,
    CacheBatch,
    CacheSequence,
    KvCache,
    copy_to_device,
)
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
    prompt: Prompt
    cache: CacheSequence  # counts positions of the prompt alone
    max_frames: int
    silence: SilenceGuard
    num_skipped: int = 0  # steps that prefilled only other prompts
    num_begun: int = 0  # frames given to the model
    codes: list[Tensor] = field(default_factory=list)  # of the frames that came back
    ended: bool = False

    @property
    def num_missing(self) -> int:
        """Positions of the prompt that are not in the cache yet."""
        return len(self.prompt.frames) - self.cache.length

    @property
    def codes_in_cache(self) -> list[Tensor]:
        """The frames that were fed back: all begun but the last, as far as they are known."""
        return self.codes[: max(self.num_begun - 1, 0)]


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
        default_context: segments before every request that has no context of its own.
        max_batch_size: most requests in a step; further ones wait in line.
        default_max_frames: `max_frames` of requests that set none; None for as many as the model's
            context has room for.
        max_silence_s: silence after which a request ends; 0 for no such end.
        num_spare_rows: further requests in a step, which `add` fills like the others. Who adds
            requests can keep these places for somebody who would otherwise wait.
        prefix_cache_bytes: limit for the keys and values that are kept for later requests, beyond
            those of the default context, which are always kept.
        normalises: normalise the texts of requests that leave it to the engine.

    Raises:
        PromptTooLongError: the default context leaves no room for speech.
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
        prefix_cache_bytes: int = 0,
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
        self.default_context = tuple(default_context)
        self._default_prompt = self._build_default_prompt()
        page_bytes = PAGE_SIZE * KvCache.position_bytes(model.config.backbone, model.dtype)
        self._cache = KvCache(
            model.config.backbone,
            rows,
            model.dtype,
            model.device,
            max_cached_pages=prefix_cache_bytes // page_bytes,
            num_kept_pages=-(-len(self._default_prompt.frames) // PAGE_SIZE),
        )
        self._batch: FrameBatch[_Live] = FrameBatch(model, mimi, self._cache, rows)
        self._pending: deque[_Pending] = deque()
        self._failed = False
        self._hurried = False  # the last step was a short one
        self._waiting: deque[_Live] = deque()
        self._live: dict[str, _Live] = {}
        self.num_prompt_positions = self.num_found_positions = 0
        self._fill_cache()

    @property
    def num_codebooks(self) -> int:
        return self.model.config.num_codebooks

    @property
    def sample_rate_hz(self) -> int:
        return self.mimi.config.sample_rate_hz

    @property
    def max_positions(self) -> int:
        """Positions of the model's context."""
        return self._cache.max_positions

    @property
    def follows_context(self) -> bool:
        """True if earlier speech in the context makes a text sound better, not worse."""
        config = self.model.config
        exact = self.model.dtype == torch.float32
        return config.follows_context and (exact or not config.context_needs_float32)

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def cache_counts(self) -> dict[str, int]:
        """Sizes and hits of the KV cache since the start. Any thread may call this."""
        return {
            **self._cache.counts(),
            "positions_asked": self.num_prompt_positions,
            "positions_found": self.num_found_positions,
        }

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
        parts = self.prompts.build([*(request.context or ()), spoken])
        before = self._default_prompt if request.context is None else None
        prompt = Prompt.build(*parts, before)
        length, limit = len(prompt.frames), self._cache.max_positions
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
        max_frames = self._cache.max_positions - len(prompt.frames)
        if (limit := self._frame_limit(request)) is not None:
            max_frames = min(limit, max_frames)
        self._waiting.append(
            _Live(
                request,
                prompt,
                CacheSequence(),
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

        All pages are freed, the batch is emptied and the default context is computed again.
        Weights and CUDA graphs stay as they are. `prepare` may run in another thread meanwhile.

        Raises:
            RuntimeError: the device has failed; the engine then cannot serve.
        """
        self._failed = True
        for live in self._live.values():
            live.ended = True
        self._live.clear()
        self._waiting.clear()
        self._pending.clear()
        self._hurried = False
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # raises the error of any kernel in flight
        self._batch.reset()
        self._cache.reset()
        self._fill_cache()
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
        chosen, counts = self._next_prompts()
        old_rows = len(self._batch.members) if self._hurries(chosen, counts) else 0
        if not old_rows:
            self._batch.step_backbone()
        self._prefill(chosen, counts)
        ahead = 0
        if self._batch.members:
            self._begin_frames(old_rows)
            ahead = FRAMES_AHEAD[self.model.device.type]
        outputs: list[FrameOutput] = []
        while len(self._pending) > ahead:
            outputs += self._finish_frames(self._pending.popleft())
        return outputs

    def _frame_limit(self, request: Request) -> int | None:
        """The frames after which a request ends with "length"; None for no limit."""
        return self.default_max_frames if request.max_frames is None else request.max_frames

    def _admit(self) -> None:
        while self._waiting and len(self._live) < self.max_batch_size + self.num_spare_rows:
            live = self._waiting[0]
            self._find_prefix(live)
            self._live[live.request.id] = self._waiting.popleft()

    def _find_prefix(self, live: _Live) -> None:
        """Skip the part of the prompt that is in the cache, but for its last position."""
        # That one is computed for its hidden state.
        live.cache = self._cache.find(live.prompt.keys, len(live.prompt.frames) - 1)
        self.num_prompt_positions += len(live.prompt.frames)
        self.num_found_positions += live.cache.length

    def _hurries(self, chosen: list[_Live], counts: list[int]) -> bool:
        """True if only requests that join in this step get a frame, since one of them is urgent.

        On a CPU a frame of a full batch takes several times as long as that of one row. The other
        requests wait for one short step, and never for two in a row.
        """
        completed = any(
            live.request.urgent and count == live.num_missing
            for live, count in zip(chosen, counts, strict=True)
        )
        can_wait = self._batch.members and not FRAMES_AHEAD[self.model.device.type]
        self._hurried = bool(completed and can_wait and not self._hurried)
        return self._hurried

    def _prefill(self, chosen: list[_Live], counts: list[int]) -> None:
        """Run the backbone over prompt tokens; completed prompts join the batch."""
        if not chosen:
            return
        parts = [
            (live.prompt, slice(live.cache.length, live.cache.length + n))
            for live, n in zip(chosen, counts, strict=True)
        ]
        frames = torch.cat([prompt.frames[part] for prompt, part in parts])
        mask = torch.cat([prompt.mask[part] for prompt, part in parts])
        batch = CacheBatch.prefill(self._cache, [live.cache for live in chosen], counts)
        device = self.model.device
        inputs = copy_to_device(frames, device), copy_to_device(mask, device)
        hidden = self.model.backbone_step(*inputs, batch, self._cache)
        for row, live in zip(hidden, chosen, strict=True):
            if live.num_missing == 0:
                request = live.request
                self._cache.publish(live.cache, live.prompt.keys)
                self._cache.reserve(live.cache, live.max_frames - 1)  # the last is not fed back
                self._batch.join(live, live.cache, request.sampling, request.seed, row)

    def _next_prompts(self) -> tuple[list[_Live], list[int]]:
        """The prompts of which this step prefills a part, and the tokens of each.

        Urgent prompts have the step to themselves, the shortest first. The others go in order of
        arrival. None is skipped for ever: see `MAX_STEPS_SKIPPED`.
        """
        left = [live for live in self._live.values() if live.num_missing]
        first = [
            live for live in left if live.request.urgent or live.num_skipped >= MAX_STEPS_SKIPPED
        ]
        first.sort(key=lambda live: (live.num_skipped < MAX_STEPS_SKIPPED, live.num_missing))
        budget = PREFILL_CHUNK_TOKENS[self.model.device.type]
        chosen: list[_Live] = []
        counts: list[int] = []
        for live in first or left:
            if budget:
                chosen.append(live)
                counts.append(min(budget, live.num_missing))
                budget -= counts[-1]
        for live in left:
            live.num_skipped = 0 if live in chosen else live.num_skipped + 1
        return chosen, counts

    def _begin_frames(self, first_row: int) -> None:
        members = self._batch.members[first_row:]
        self._pending.append(_Pending(members, self._batch.draw_frames(first_row)))
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
            self._end(self._live.pop(live.request.id), keep=False)
            return FrameOutput(live.request.id, None, None, "error", NOT_FINITE)
        if not codes.any():  # Sesame's stop frame, which is not spoken
            self.abort(live.request.id)
            return FrameOutput(live.request.id, None, None, "stop")
        # Copy: the rows are views of the whole batch's tensors, in memory that the GPU writes to.
        live.codes.append(codes.clone())
        reason: FinishReason | None = None
        if len(live.codes) == live.max_frames:
            is_limit = len(live.codes) == self._frame_limit(live.request)
            reason = "length" if is_limit else "context"
        elif live.silence.is_over(level):
            reason = "silence"
        if reason:
            self.abort(live.request.id)
        return FrameOutput(live.request.id, live.codes[-1], audio.clone().numpy(), reason)

    def _end(self, live: _Live, keep: bool = True) -> None:
        """Free a request's row and pages; `keep` what is in the cache for later requests."""
        live.ended = True
        if live in self._batch.members:
            self._batch.leave(live)
        if not keep:
            self._cache.forget(live.cache)
            self._cache.release(live.cache)
            self._keep_default_context()
            return
        keys, length = live.prompt.keys, live.cache.length
        if spoken := live.codes_in_cache:
            keys, length = keys.copy(), length + len(spoken)
            keys.extend(*self.model.next_inputs(torch.stack(spoken)))
        self._cache.release(live.cache, keys, length)

    def _build_default_prompt(self) -> Prompt:
        segments, k = self.default_context, self.model.config.num_codebooks
        empty = torch.zeros(0, k + 1, dtype=torch.int64)
        prompt = Prompt.build(*(self.prompts.build(segments) if segments else (empty, empty > 0)))
        limit = self.model.config.backbone.max_positions
        if len(prompt.frames) >= limit:
            raise PromptTooLongError(
                f"the default context takes {len(prompt.frames)} positions of {limit}"
            )
        return prompt

    @torch.inference_mode()
    def _fill_cache(self) -> None:
        """Compute the keys and values of the default context, whose pages stay held."""
        frames, mask, keys, _ = self._default_prompt
        device = self.model.device
        chunk = PREFILL_CHUNK_TOKENS[device.type]
        self._default_sequence = sequence = CacheSequence()
        for start in range(0, len(frames), chunk):
            part = slice(start, start + chunk)
            batch = CacheBatch.prefill(self._cache, [sequence], [len(frames[part])])
            self.model.backbone_step(
                frames[part].to(device), mask[part].to(device), batch, self._cache
            )
        self._cache.publish(sequence, keys, grows=False)

    def _keep_default_context(self) -> None:
        """Let requests find the default context again, after a request that failed was forgotten.

        Only a fault of the device makes its own values bad.
        """
        sequence = self._default_sequence
        if self._cache.is_finite(sequence):
            self._cache.publish(sequence, self._default_prompt.keys, grows=False)
        else:
            self._cache.forget(sequence)
            self._cache.release(sequence)
            self._fill_cache()
