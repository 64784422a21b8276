"""Conversations in Python: turns with the earlier ones as context."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vox_serve.conversation_turns import TurnBuilder
from vox_serve.conversations import Conversation, Turn, heard
from vox_serve.ending import FRAME_S
from vox_serve.engine_streams import EngineStreams
from vox_serve.job import SpokenFrame

if TYPE_CHECKING:
    from vox_serve.engine_streams import Chunks
    from vox_serve.prompt import Segment
    from vox_serve.request import FrameOutput, Prompt, Request
    from vox_serve.voice_maker import Audio


class Dialogue:
    """A conversation of which the model speaks some turns, and others come as recordings.

    When the model's context is full the oldest turns leave it. A model that was trained on single
    utterances gets no turns as context; they are kept all the same.

    Not thread-safe. A stream must end, or be closed, before the next turn begins.

    Args:
        streams: speak the model's turns.
        make_request: makes a request of a text and a call's settings.
        encode: makes a segment of a text, a recording and its speaker.
    """

    def __init__(
        self,
        streams: EngineStreams,
        make_request: "Callable[[str, dict[str, Any]], Request]",
        encode: "Callable[[str, Audio, int], Segment]",
    ) -> None:
        self._streams, self._engine = streams, streams.engine
        self._make_request = make_request
        self._encode = encode
        self._builder = TurnBuilder(self._engine)
        self._kept = Conversation("", "", self._engine.max_positions)

    @property
    def turns(self) -> Sequence[Turn]:
        """The turns, oldest first; those that no later context has room for are forgotten."""
        return tuple(self._kept.turns)

    def say(self, text: str, **overrides: Any) -> "np.ndarray":
        """Speak a text as the next turn; see `Voice.say`."""
        chunks = self._start(text, overrides, stacklevel=4)
        return np.concatenate([np.zeros(0, np.float32), *chunks])

    def stream(self, text: str, **overrides: Any) -> "Chunks":
        """Speak a text as the next turn, in chunks; see `Voice.stream`.

        A stream that is closed early leaves as a turn what it gave, with the words of the text in
        proportion.
        """
        return self._start(text, overrides, stacklevel=3)

    def hear(self, text: str, audio: "Audio", speaker: int = 1) -> None:
        """Add a turn that somebody else spoke; arguments and errors are `Voice.segment`'s."""
        segment = self._encode(text, audio, speaker)
        assert segment.codes is not None
        length = self._builder.length(segment)
        self._kept.add(Turn(speaker, text, segment.codes.numpy(), False, length))

    def _start(self, text: str, overrides: dict[str, Any], stacklevel: int) -> "Chunks":
        request = self._make_request(text, overrides)
        if self._engine.follows_context:
            room = self._builder.room(request)
            request = self._builder.with_turns(request, self._kept, room)
        return self._run(request, self._engine.prepare(request), stacklevel)

    def _run(self, request: "Request", prompt: "Prompt", stacklevel: int) -> "Chunks":
        frames: list[SpokenFrame] = []

        def take(output: "FrameOutput") -> None:
            if output.codes is not None:
                frames.append(SpokenFrame(output.part, output.codes.numpy().astype(np.int32)))

        is_cut = False
        try:
            return (yield from self._streams.run(request, prompt, stacklevel, take))
        except GeneratorExit:
            is_cut = True
            raise
        except BaseException:
            frames.clear()
            raise
        finally:
            spoken = self._builder.spoken(request, prompt, frames, is_cut)
            for utterance in heard(spoken, len(frames), FRAME_S):
                self._kept.add(self._builder.turn(utterance, generated=True))
