"""Speaks texts of any length: in parts, one after another, as one request.

A text that is longer than an utterance should be is split at sentence ends. Each part is spoken
with the request's context and the parts just before it, so that the voice carries on. The parts'
samples follow each other without a gap; a step between two of them decays within 10 ms.
"""

import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vox_serve.ending import CUT_REASONS, fade_tail
from vox_serve.engine import Engine
from vox_serve.policy import Row
from vox_serve.prompt import PromptTooLongError, Segment
from vox_serve.request import FinishReason, FrameOutput, Prompt, Request
from vox_serve.text.splitting import PREFERRED_CHARS, split
from vox_serve.text_bound import (
    POSITIONS_PER_SPOKEN_CHAR,
    frames_bound,
    frames_expected,
    most_part_chars,
)
from vox_serve.warm_up import warm_up

MAX_RECENT_POSITIONS = 512
"""Most positions of the context that earlier parts take: 40 s of speech. More would slow down each
frame, and change little."""

UNWRITTEN_FRAMES = 60
"""Expected frames of a text that is not written yet: about a sentence."""


@dataclass
class _Passage:
    """A request whose text has several parts.

    Attributes:
        request: as it was added.
        parts: texts of all parts.
        number: index of the part that is being spoken.
        recent: earlier parts that the next one gets as context, and the positions of each.
        max_recent: most positions of these.
        codes: frames of the part that is being spoken.
        num_frames: frames of earlier parts.
        last_sample: the last one so far.
        reason: finish reason of the first part that did not end by itself.
        last_reason: finish reason of the last part that ended.
        withheld: the last frame of a part that was cut, while nobody knows if another part
            follows: without one the frame fades.
        num_tokenized: parts whose tokens are kept or being made.
        num_counted: parts whose expected frames are in `frames_expected`.
        frames_expected: of these parts together.
        row: the passage as the engine's policy sees it.
    """

    request: Request
    parts: Sequence[str]
    max_recent: int
    number: int = 0
    recent: list[tuple[Segment, int]] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)
    num_frames: int = 0
    last_sample: float = 0.0
    reason: FinishReason | None = None
    last_reason: FinishReason = "stop"
    withheld: FrameOutput | None = None
    num_tokenized: int = 1
    num_counted: int = 0
    frames_expected: float = 0.0
    row: Row | None = None

    @property
    def has_next(self) -> bool | None:
        """True if another part follows; None if that is not known yet."""
        feed = self.request.feed
        is_open = feed is not None and feed.is_open  # before the length, which may grow meanwhile
        if self.number + 1 < len(self.parts):
            return True
        return None if is_open else False


class LongForm:
    """An engine for texts of any length. Calls, errors and outputs are `Engine`'s.

    A request whose text has one part is passed on as it is.

    Args:
        engine: speaks the parts; nothing else may call it, except its `prepare`.
        split_chars: longer texts are split, 0 for none; so are texts that are too long for the
            model to speak them well.
        max_recent_positions: most positions of earlier parts in the context of a part; 0 for a
            model that does not follow its context.
    """

    def __init__(
        self,
        engine: Engine,
        split_chars: int,
        max_recent_positions: int = MAX_RECENT_POSITIONS,
    ) -> None:
        self.engine = engine
        self.model, self.mimi, self.prompts = engine.model, engine.mimi, engine.prompts
        self.max_batch_size, self.num_spare_rows = engine.max_batch_size, engine.num_spare_rows
        self.num_codebooks, self.sample_rate_hz = engine.num_codebooks, engine.sample_rate_hz
        self.part_chars = most_part_chars(split_chars, engine.max_positions, engine.max_part_chars)
        self.split_chars = self.part_chars if split_chars else 0
        self.max_positions, self.default_context = engine.max_positions, engine.default_context
        self.follows_context = engine.follows_context
        self.max_recent_positions = max_recent_positions if self.follows_context else 0
        self.times, self.lengths = engine.times, engine.lengths
        self.idle_prefill = engine.idle_prefill
        self._passages: dict[str, _Passage] = {}
        self._starved: dict[str, _Passage] = {}  # those whose next part is not written yet
        self._tokenizing = ThreadPoolExecutor(1, "tokenizing")

    @property
    def has_work(self) -> bool:
        has_news = any(passage.has_next is not None for passage in self._starved.values())
        return has_news or self.engine.has_work

    @property
    def rows(self) -> list[Row]:
        """All requests as the policy sees them; see `Engine.rows`."""
        starved = [passage.row for passage in list(self._starved.values()) if passage.row]
        return [*self.engine.rows, *starved]

    def cache_counts(self) -> dict[str, int]:
        """Sizes and hits of the KV cache; see `Engine.cache_counts`."""
        return self.engine.cache_counts()

    def spoken_text(self, request: Request) -> str:
        """A request's text as the model reads it."""
        return self.engine.spoken_text(request)

    def prepare(self, request: Request) -> Prompt:
        """Split a text and tokenize its first part. Any thread may call this; see `Engine`."""
        if request.feed is not None:
            return self.engine.prepare(request)._replace(parts=request.feed)
        parts: Sequence[str] = [request.text]
        if self.split_chars and len(request.text) > self.split_chars:
            parts = (
                split(request.text, self.split_chars, min(PREFERRED_CHARS, self.split_chars))
                or parts
            )
        return self.engine.prepare(replace(request, text=parts[0]))._replace(parts=tuple(parts))

    def add(self, request: Request, prompt: Prompt | None = None) -> None:
        """Put a request in line; see `Engine.add`."""
        prompt = prompt or self.prepare(request)
        if request.feed is not None:
            request.feed.num_spoken = 0
        elif len(prompt.parts) <= 1:
            self.engine.add(request, prompt)
            return
        room = self.engine.max_positions - len(prompt.frames)
        room -= int(POSITIONS_PER_SPOKEN_CHAR * self.part_chars)  # of the next part
        passage = _Passage(
            request, prompt.parts, max_recent=max(0, min(self.max_recent_positions, room))
        )
        self._add(passage, prompt)
        self._passages[request.id] = passage
        self._tokenize_next(passage)

    def step(self, held: Collection[str] = ()) -> list[FrameOutput]:
        """Frames of some requests; see `Engine.step`."""
        outputs = [
            output
            for passage in list(self._starved.values())
            if passage.has_next is not None
            for output in self._resume(passage)
        ]
        for output in self.engine.step(held) if self.engine.has_work else ():
            if (passage := self._passages.get(output.request_id)) is not None:
                output = self._follow(passage, output)
            if output.codes is not None or output.finish_reason or output.part_reason:
                outputs.append(output)
        return outputs

    def abort(self, request_id: str) -> None:
        """Drop a request; see `Engine.abort`."""
        self._passages.pop(request_id, None)
        self._starved.pop(request_id, None)
        self.engine.abort(request_id)

    def warm_up(self, seconds: float | None) -> None:
        """Make trial steps, without requests; see `warm_up`."""
        warm_up(self.engine, seconds)

    def reset(self) -> None:
        """Drop all requests; see `Engine.reset`."""
        self._passages.clear()
        self._starved.clear()
        self.engine.reset()

    def _follow(self, passage: _Passage, output: FrameOutput) -> FrameOutput:
        """Take a part's output; after its end begin the next part."""
        output = output._replace(part=passage.number)
        codes, audio = output.codes, output.audio
        if codes is not None and audio is not None:
            if passage.number and not passage.codes:
                audio = _joined(audio, passage.last_sample)
            passage.codes.append(codes)
            passage.last_sample = float(audio[-1])
            output = output._replace(audio=audio)
        self._tokenize_next(passage)
        reason = output.finish_reason
        if reason is None:
            return output
        passage.num_frames += len(passage.codes)
        passage.last_reason = reason
        if passage.request.feed is not None:
            output = output._replace(part_reason=reason)
        has_next = passage.has_next
        limit = passage.request.max_frames
        if reason == "error" or has_next is False or (limit and passage.num_frames >= limit):
            return self._finish(passage, output)
        if has_next is None:
            return self._starve(passage, output)
        return self._go_on(passage, output)

    def _finish(self, passage: _Passage, output: FrameOutput) -> FrameOutput:
        """Make an output the passage's last."""
        del self._passages[output.request_id]
        self._count_spoken(passage)
        reason = passage.last_reason
        if reason == "stop" and passage.reason:
            reason = passage.reason
        return output._replace(finish_reason=reason)

    def _go_on(self, passage: _Passage, output: FrameOutput) -> FrameOutput:
        """Begin the next part after an output."""
        if passage.last_reason != "stop":
            passage.reason = passage.reason or passage.last_reason
        self._count_spoken(passage)
        try:
            self._begin_next(passage)
        except ValueError as error:
            del self._passages[output.request_id]
            reason: FinishReason = "context" if isinstance(error, PromptTooLongError) else "error"
            return output._replace(finish_reason=reason, error=str(error), is_refused=True)
        return output._replace(finish_reason=None)

    def _starve(self, passage: _Passage, output: FrameOutput) -> FrameOutput:
        """Wait for the next part. A last frame that may have to fade waits with it."""
        self._starved[output.request_id] = passage
        output = output._replace(finish_reason=None)
        if passage.last_reason in CUT_REASONS:
            passage.withheld = output
            output = FrameOutput(output.request_id, None, None, None)
        self._count_spoken(passage)
        return output

    def _resume(self, passage: _Passage) -> list[FrameOutput]:
        """Go on with a passage whose next part, or end, has come."""
        request_id = passage.request.id
        del self._starved[request_id]
        output = passage.withheld or FrameOutput(request_id, None, None, None, part=passage.number)
        passage.withheld = None
        output = (self._go_on if passage.has_next else self._finish)(passage, output)
        is_empty = output.codes is None and output.finish_reason is None
        return [] if is_empty else [output]

    @staticmethod
    def _count_spoken(passage: _Passage) -> None:
        if passage.request.feed is not None:
            passage.request.feed.count_spoken(passage.number + 1, time.monotonic())

    def _begin_next(self, passage: _Passage) -> None:
        if passage.codes:
            segment = self._segment(passage, passage.number)
            length = len(self.prompts.tokens(segment)) + len(passage.codes) + 1
            segment = replace(segment, codes=torch.stack(passage.codes))
            passage.recent.append((segment, length))
        # Half of it goes at once, so that the next parts find what stays in the cache.
        if sum(length for _, length in passage.recent) > passage.max_recent:
            while sum(length for _, length in passage.recent) > passage.max_recent // 2:
                passage.recent.pop(0)
        passage.number += 1
        passage.codes = []
        try:
            self._add(passage)
        except PromptTooLongError:
            if not passage.recent:
                raise
            passage.recent.clear()
            self._add(passage)
        self._tokenize_next(passage)

    def _add(self, passage: _Passage, prompt: Prompt | None = None) -> None:
        """Add the next part to the engine."""
        passage.row = self.engine.add(self._request(passage), prompt, passage.row)
        new_parts = passage.parts[passage.num_counted :]
        passage.num_counted += len(new_parts)
        passage.frames_expected += sum(
            self.lengths.expected(frames_expected(part)) for part in new_parts
        )
        passage.row.frames_expected = passage.frames_expected
        if passage.has_next is None:
            passage.row.frames_expected += UNWRITTEN_FRAMES

    def _segment(self, passage: _Passage, number: int) -> Segment:
        """A part as the model reads it."""
        part = replace(passage.request, text=passage.parts[number])
        return Segment(part.speaker, self.engine.spoken_text(part))

    def _request(self, passage: _Passage) -> Request:
        """The request of the next part."""
        request, number = passage.request, passage.number
        text, context = passage.parts[number], request.context
        if passage.recent:
            base = self.engine.default_context if context is None else context
            context = [*base, *(segment for segment, _ in passage.recent)]
        limit = frames_bound(text) if self.engine.max_silence_s else None
        if request.max_frames is not None:
            left = request.max_frames - passage.num_frames
            limit = left if limit is None else min(limit, left)
        # Frames count from 0 in each part: with one seed all parts would have the same draws.
        seed = (request.seed + number + 2**63) % 2**64 - 2**63
        return replace(
            request,
            text=text,
            context=context,
            sampling=request.sampling.model_copy(update={"seed": seed}),
            max_frames=limit,
            urgent=request.urgent and number == 0,
        )

    def _tokenize_next(self, passage: _Passage) -> None:
        """Tokenize the next part in another thread; `PromptBuilder` keeps the tokens."""
        number = passage.number + 1
        if passage.num_tokenized <= number < len(passage.parts):
            passage.num_tokenized = number + 1
            with suppress(RuntimeError):  # no thread is left: it is tokenized when its turn comes
                self._tokenizing.submit(lambda: self.prompts.tokens(self._segment(passage, number)))


def _joined(audio: np.ndarray, last_sample: float) -> np.ndarray:
    """A part's first frame, without a step from the last sample before it."""
    joined = audio.copy()
    tail = fade_tail(last_sample - audio[0])
    joined[: len(tail)] += tail
    return joined
