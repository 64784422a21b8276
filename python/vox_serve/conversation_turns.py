"""Turns of what was spoken, and the context that a conversation's turns make for a request."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vox_serve.conversations import Conversation, Turn, Utterance
from vox_serve.engine_thread import AnyEngine
from vox_serve.job import SpokenFrame
from vox_serve.prompt import Segment
from vox_serve.request import Prompt, Request
from vox_serve.text_bound import POSITIONS_PER_SPOKEN_CHAR, frames_bound

MAX_RESERVE = 0.5
"""Largest part of the model's context, without the voice, that is kept for text and speech."""


class TurnBuilder:
    """Counts positions and makes turns for one engine. Any thread may use it.

    Args:
        engine: speaks the requests.
    """

    def __init__(self, engine: AnyEngine) -> None:
        self._engine = engine

    def room(self, request: Request) -> int:
        """Positions that turns may have beside a request's voice, text and speech.

        Raises:
            ValueError: the text cannot be tokenized.
        """
        base = self._engine.default_context if request.context is None else request.context
        most = self._engine.max_positions - sum(self.length(segment) for segment in base)
        if request.feed is not None:  # as for the longest parts that may come
            num_positions = int(POSITIONS_PER_SPOKEN_CHAR * self._engine.part_chars)
            return most - min(2 * num_positions, int(MAX_RESERVE * most))
        text, split_chars = request.text, self._engine.split_chars
        if is_split := bool(split_chars and len(text) > split_chars):
            text = text[:split_chars]
        # Half the bound is still half as much again as slow speech takes.
        num_frames = frames_bound(text) // 2
        if request.max_frames is not None:
            num_frames = min(num_frames, request.max_frames)
        num_frames *= 1 + is_split  # the part before becomes context too
        text = self._engine.spoken_text(replace(request, text=text))
        num_tokens = self.length(Segment(request.speaker, text)) if text.strip() else 0
        reserve = min(num_tokens + num_frames, int(MAX_RESERVE * most))
        return most - reserve

    def with_turns(self, request: Request, conversation: Conversation, room: int) -> Request:
        """A request with the last turns as context, after its voice.

        Args:
            request: continues the conversation.
            conversation: whose turns.
            room: positions that they may have.
        """
        turns = conversation.context(room)
        return replace(request, context=self._context(request.context, turns)) if turns else request

    def prompt(self, base: Sequence[Segment] | None, turns: Sequence[Turn]) -> Prompt:
        """Turns after other context, None for the default one, as the model's input."""
        return Prompt.build(*self._engine.prompts.build(self._context(base, turns)))

    def _context(self, base: Sequence[Segment] | None, turns: Sequence[Turn]) -> list[Segment]:
        base = self._engine.default_context if base is None else base
        return [*base, *map(_segment, turns)]

    def spoken(
        self,
        request: Request,
        prompt: Prompt | None,
        frames: Sequence[SpokenFrame],
        is_cut: bool,
        num_complete: int = 0,
    ) -> list[Utterance]:
        """The parts of a request's text that were spoken.

        Args:
            request: as it was given to the engine.
            prompt: its prompt; None before it has one.
            frames: of its speech.
            is_cut: the last part that was spoken may not be complete.
            num_complete: parts that are complete all the same.
        """
        texts = (prompt.parts if prompt else ()) or (request.text,)
        parts: dict[int, list[np.ndarray]] = {}
        for frame in frames:
            parts.setdefault(frame.part, []).append(frame.codes)
        return [
            Utterance(
                request.speaker,
                self._engine.spoken_text(replace(request, text=texts[part])),
                np.stack(codes),
                is_complete=part < num_complete or not (is_cut and part == max(parts)),
            )
            for part, codes in parts.items()
        ]

    def turn(self, spoken: Utterance, generated: bool) -> Turn:
        """A turn of an utterance.

        Raises:
            ValueError: its text cannot be tokenized.
        """
        length = self.length(Segment(spoken.speaker, spoken.text)) + len(spoken.codes)
        is_small = self._engine.prompts.config.audio_vocab_size <= 2**15
        codes = spoken.codes.astype(np.int16 if is_small else np.int32)
        return Turn(spoken.speaker, spoken.text, codes, generated, length)

    def length(self, segment: Segment) -> int:
        """Positions of a segment.

        Raises:
            ValueError: its text cannot be tokenized.
        """
        num_frames = 0 if segment.codes is None else len(segment.codes)
        return len(self._engine.prompts.tokens(segment)) + num_frames + 1


def _segment(turn: Turn) -> Segment:
    return Segment(turn.speaker, turn.text, torch.from_numpy(turn.codes.astype(np.int64)))
