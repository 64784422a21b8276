"""Continuous batching over frames: `add` requests, `step` one frame of each, `abort` any of them.

Requests join and leave between frames. The ops compute a row in the same order whatever else is in
the batch, and draws depend only on seed, frame and codebook. So a request gets the same codes
alone, in a batch, and however its prompt was cut into chunks.

What a prompt has in common with earlier prompts and with the speech that followed them is found in
the KV cache, and not computed again.

A GPU works on one frame while the host handles the previous one. By the time the host sees that a
request has ended, the GPU has already begun one more frame of it, which is discarded.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vox_serve.default_context import DefaultContext
from vox_serve.ending import SilenceGuard
from vox_serve.fifo import choose_all
from vox_serve.frame_batch import FrameBatch, Frames
from vox_serve.idle_prefill import IdlePrefill
from vox_serve.kv_cache import PAGE_SIZE, KvCache
from vox_serve.live_request import LiveRequest
from vox_serve.mimi import Mimi
from vox_serve.model import CsmModel
from vox_serve.paging import Paging
from vox_serve.policy import FRAME_S, Row, Step
from vox_serve.prefill import Part, prefill
from vox_serve.prompt import PromptBuilder, Segment
from vox_serve.request import FinishReason, FrameOutput, Prompt, Request
from vox_serve.request import PromptTooLongError as PromptTooLongError
from vox_serve.request_reader import RequestReader
from vox_serve.speech_lengths import SpeechLengths
from vox_serve.step_meter import StepMeter
from vox_serve.step_times import StepTimes
from vox_serve.text_bound import frames_expected, most_part_chars

PREFILL_CHUNK_TOKENS = {"cpu": 64, "cuda": 512}
"""Most prompt tokens in one step, by device type: few enough that a long prompt does not delay live
requests for long, enough to reuse each weight that is read."""

NOT_FINITE = "the model produced numbers that are not finite"
"""The error of a request whose hidden states, logits or audio hold NaN or infinity."""

FRAMES_AHEAD = {"cpu": 0, "cuda": 1}
"""Frames that may be in flight when `step` returns, by device type."""


Choose = Callable[[Iterable[Row], float, StepTimes, int], Step]
"""A policy; see `vox_serve.policy.choose_step`."""


class _Pending(NamedTuple):
    """A frame in flight."""

    members: list[LiveRequest]  # of the rows
    frames: Frames
    num_tokens: int  # prefilled in the same step


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
        kv_cache_bytes: keys and values of live requests; None for as many as all of them can have.
            With less, requests may lose theirs, and they are computed again.
        choose: chooses the requests of each step, and the prompts.
        clock: the time in seconds.

    Attributes:
        choose: see above.
        times: how long steps take.
        lengths: how long speech takes.
        idle_prefill: prefills contexts while there are no requests, if its `step` is called.

    Raises:
        PromptTooLongError: the default context leaves no room for speech.
        ValueError: `kv_cache_bytes` have no room for one request.
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
        kv_cache_bytes: int | None = None,
        choose: Choose = choose_all,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.mimi = mimi
        self.prompts = prompts
        self.max_batch_size = max_batch_size
        self.num_spare_rows = num_spare_rows
        self.default_max_frames = default_max_frames
        self.max_silence_s = max_silence_s
        self.default_context = tuple(default_context)
        self._default = DefaultContext(model, prompts, self.default_context)
        self._reader = RequestReader(model.config, prompts, self._default.prompt, normalises)
        rows = max_batch_size + num_spare_rows
        sequence_bytes = KvCache.sequence_bytes(model.config.backbone, model.dtype)
        if kv_cache_bytes is not None and kv_cache_bytes < sequence_bytes:
            raise ValueError(
                f"kv_cache_bytes must be at least {sequence_bytes}, room for one request of "
                f"{model.config.backbone.max_positions} positions, got {kv_cache_bytes}"
            )
        page_bytes = PAGE_SIZE * KvCache.position_bytes(model.config.backbone, model.dtype)
        self._cache = KvCache(
            model.config.backbone,
            rows,
            model.dtype,
            model.device,
            max_cached_pages=prefix_cache_bytes // page_bytes,
            num_kept_pages=self._default.num_pages,
            num_pages=None if kv_cache_bytes is None else kv_cache_bytes // page_bytes,
        )
        self._batch: FrameBatch[LiveRequest] = FrameBatch(model, mimi, self._cache, rows)
        self._paging = Paging(self._cache, self._batch, model)
        self.choose, self._clock = choose, clock
        self.times = StepTimes()
        self.lengths = SpeechLengths()
        self.idle_prefill = IdlePrefill(model, self._cache, self.times, self._chunk_tokens)
        self._meter = StepMeter(self.times)
        self._pending: deque[_Pending] = deque()
        self._failed = False
        self._waiting: dict[str, LiveRequest] = {}
        self._live: dict[str, LiveRequest] = {}
        self.num_prompt_positions = self.num_found_positions = 0
        self._default.fill(self._cache, self._chunk_tokens)

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
        return self.model.config.follows_context

    @property
    def max_part_chars(self) -> int | None:
        """The longest text that the model speaks well at once; None if that is not known."""
        return self.model.config.max_part_chars

    split_chars = 0
    """Longer texts are spoken in parts: none here, see `LongForm`."""

    @property
    def part_chars(self) -> int:
        """The longest text of one request."""
        return most_part_chars(self.split_chars, self.max_positions, self.max_part_chars)

    @property
    def rows(self) -> list[Row]:
        """All requests as the policy sees them. Any thread may call this."""
        return [live.row for live in (*self._live.values(), *self._waiting.values())]

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
            "positions_ahead": self.idle_prefill.num_positions,
        }

    @property
    def num_losses(self) -> int:
        """Requests that lost their pages to others for a time, since the start."""
        return self._paging.num_losses

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._waiting)

    @property
    def _chunk_tokens(self) -> int:
        return PREFILL_CHUNK_TOKENS[self.model.device.type]

    def prepare(self, request: Request) -> Prompt:
        """Tokenize a request and check that it can be spoken. Any thread may call this.

        A long text takes a fraction of a second, and live requests should not wait for it.

        Raises:
            PromptTooLongError: the prompt leaves no room for a frame.
            ValueError: a field is out of range.
        """
        return self._reader.prepare(request)

    def spoken_text(self, request: Request) -> str:
        """A request's text as the model reads it."""
        return self._reader.spoken_text(request)

    def add(self, request: Request, prompt: Prompt | None = None, row: Row | None = None) -> Row:
        """Put a request in line.

        Args:
            request: the text to speak.
            prompt: the result of `prepare` for this request; None to prepare it here.
            row: of an earlier part of the same speech, whose listener goes on; None for a new one.

        Returns:
            The request as the policy sees it.

        Raises:
            ValueError: a live request has the same id; or see `prepare`.
        """
        if request.id in self._live or request.id in self._waiting:
            raise ValueError(f"id {request.id!r} is in use by a live request")
        prompt = prompt or self.prepare(request)
        max_frames = self._cache.max_positions - len(prompt.frames)
        if (limit := self._frame_limit(request)) is not None:
            max_frames = min(limit, max_frames)
        if row is None:
            row = Row(
                request.id,
                self._clock(),
                streams=request.streams,
                urgent=request.urgent,
                frame_s=FRAME_S / request.speed,
                frames_expected=min(
                    max_frames, self.lengths.expected(frames_expected(request.text))
                ),
            )
        else:
            row.moved_s = self._clock()
        silence = SilenceGuard(self.max_silence_s)
        self._waiting[request.id] = LiveRequest(request, prompt, max_frames, silence, row)
        return row

    def abort(self, request_id: str, keep: bool = True) -> None:
        """Drop a waiting or live request and free its pages. Unknown ids are ignored.

        Args:
            request_id: the request's.
            keep: later requests may find what is in the pages.
        """
        if live := self._live.pop(request_id, None):
            self._end(live, keep)
        self._waiting.pop(request_id, None)
        if not self.has_work:
            self._meter.rest()

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
        self.idle_prefill.clear()
        self._meter.rest()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # raises the error of any kernel in flight
        self._batch.reset()
        self._paging.reset()
        self._cache.reset()
        self._default.fill(self._cache, self._chunk_tokens)
        self._failed = False

    @torch.inference_mode()
    def step(self, held: Collection[str] = ()) -> list[FrameOutput]:
        """Prefill some prompt tokens, and make a frame for some requests, as the policy chooses.

        Args:
            held: ids of requests that get no frame now.

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
            return self._step(held)
        except BaseException:
            self._failed = True
            raise

    def _step(self, held: Collection[str]) -> list[FrameOutput]:
        now_s = self._clock()
        self._meter.begin(now_s)
        self._admit()
        rows = [
            live.row
            for live in self._live.values()
            if live.holds_pages and not live.is_begun and live.request.id not in held
        ]
        step = self.choose(rows, now_s, self.times, self._chunk_tokens)
        num_tokens, has_frames = self._begin(step)
        ahead = FRAMES_AHEAD[self.model.device.type] if has_frames else 0
        outputs: list[FrameOutput] = []
        while len(self._pending) > ahead:
            outputs += self._finish_frames(self._pending.popleft())
        if not has_frames:
            self._meter.prefilled(self._clock(), num_tokens, self.model.device.type == "cpu")
        if not self.has_work:
            self._meter.rest()
        return outputs

    def _begin(self, step: Step) -> tuple[int, bool]:
        """Launch a step; returns the number of tokens prefilled, and if any request gets a frame.

        Requests that lose their pages to others in this step are left out.
        """
        complete = [row for row, count in step.prompts if not count]
        active = self._paging.grow(
            (self._live[row.id] for row in (*step.frames, *complete)), self._live.values()
        )
        parts = [(self._live[row.id], count) for row, count in step.prompts if count]
        parts = [(live, count) for live, count in parts if live.holds_pages]
        joining = [live for live, n in parts if n == live.row.num_missing and not live.num_begun]
        self._batch.arrange(active, len(joining))
        self._batch.step_backbone()
        if parts:
            self._prefill(parts)
        num_tokens = sum(count for _, count in parts)
        if not active and not joining:
            return num_tokens, False
        members, frames = self._batch.draw_frames()
        self._pending.append(_Pending(members, frames, num_tokens))
        for live in members:
            live.num_begun += 1
            if live.is_begun:
                self._batch.leave(live)
        return num_tokens, True

    def _frame_limit(self, request: Request) -> int | None:
        """The frames after which a request ends with "length"; None for no limit."""
        return self.default_max_frames if request.max_frames is None else request.max_frames

    def _admit(self) -> None:
        """Give pages to those that lost theirs, then to those that wait.

        Raises:
            RuntimeError: nobody holds pages, and yet there are not enough for one request.
        """
        self._give_pages()
        is_stuck = self.has_work and not self._pending
        if is_stuck and not any(live.holds_pages for live in self._live.values()):
            raise RuntimeError("the KV cache lost pages")

    def _give_pages(self) -> None:
        room = self.max_batch_size + self.num_spare_rows - len(self._live)
        if not self._paging.restore(self._live.values()) or not self._waiting or not room:
            return
        num_growing = self._paging.num_growing(self._live.values())
        for live in list(itertools.islice(self._waiting.values(), room)):
            if not self._paging.admit(live, num_growing):
                return
            num_growing += self._paging.num_growing([live])
            self._live[live.request.id] = self._waiting.pop(live.request.id)
            self.num_prompt_positions += len(live.prompt.frames)
            self.num_found_positions += live.cache.length

    def _prefill(self, parts: list[tuple[LiveRequest, int]]) -> None:
        """Prefill inputs; requests whose prompt is completed join the batch."""
        hidden = prefill(
            self.model,
            self._cache,
            [Part(live.inputs, live.cache, count) for live, count in parts],
        )
        now_s = self._clock()
        for row, (live, count) in zip(hidden, parts, strict=True):
            live.row.prefilled(count, now_s)
            if live.row.num_missing:
                continue
            self._cache.publish(live.cache, live.inputs.keys)
            if live.num_begun:
                self._batch.resume(live, live.cache)
            else:
                request = live.request
                self._batch.join(live, live.cache, request.sampling, request.seed, row)

    def _finish_frames(self, pending: _Pending) -> list[FrameOutput]:
        members, frames, num_tokens = pending
        frames.wait()
        now_s = self._clock()
        self._meter.finish(now_s, len(members), num_tokens)
        return [
            self._finish_frame(live, codes if spoken else None, audio, level, now_s)
            for live, codes, spoken, audio, level in zip(
                members, frames.codes, frames.spoken(), frames.audio, frames.levels(), strict=True
            )
            if not live.ended
        ]

    def _finish_frame(
        self, live: LiveRequest, codes: Tensor | None, audio: Tensor, level: float, now_s: float
    ) -> FrameOutput:
        """Output a frame and its samples, both on the CPU; end the request after its last.

        Args:
            live: the request.
            codes: `[K]`; None for a stop frame.
            audio: the samples.
            level: their root mean square; not finite if the frame is not.
            now_s: the time.
        """
        if not math.isfinite(level):
            self._end(self._live.pop(live.request.id), keep=False)
            return FrameOutput(live.request.id, None, None, "error", NOT_FINITE)
        if codes is None:
            self._learn_length(live)
            self.abort(live.request.id)
            return FrameOutput(live.request.id, None, None, "stop")
        # Copy: the rows are views of the whole batch's tensors, in memory that the GPU writes to.
        live.codes.append(codes.clone())
        live.row.made_frame(now_s)
        reason: FinishReason | None = None
        if len(live.codes) == live.max_frames:
            is_limit = len(live.codes) == self._frame_limit(live.request)
            reason = "length" if is_limit else "context"
        elif live.silence.is_over(level):
            reason = "silence"
        if reason:
            self._learn_length(live, was_cut=reason != "silence")
            self.abort(live.request.id)
        return FrameOutput(live.request.id, live.codes[-1], audio.clone().numpy(), reason)

    def _learn_length(self, live: LiveRequest, was_cut: bool = False) -> None:
        self.lengths.ended(frames_expected(live.request.text), len(live.codes), was_cut)

    def _end(self, live: LiveRequest, keep: bool = True) -> None:
        """Free a request's row and pages; `keep` what is in the cache for later requests."""
        live.ended = True
        self._paging.end(live, keep)
        if not keep:
            self._default.keep(self._cache, self._chunk_tokens)
