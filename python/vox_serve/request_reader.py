"""Turns requests into the model's input."""

from vox_serve.model_config import CsmConfig
from vox_serve.prompt import CHARS_PER_POSITION, PromptBuilder, PromptTooLongError, Segment
from vox_serve.request import Prompt, Request
from vox_serve.text.normalising import normalise


class RequestReader:
    """Reads the text and the context of requests. Any thread may use it.

    Args:
        config: the model's sizes.
        prompts: turns text and context into the model's input.
        default: the prompt of the context of requests that have none of their own.
        normalises: normalise the texts of requests that leave it to the engine.
    """

    def __init__(
        self, config: CsmConfig, prompts: PromptBuilder, default: Prompt, normalises: bool
    ) -> None:
        self._max_positions = config.backbone.max_positions
        self._follows_context = config.follows_context
        self._prompts, self._default, self._normalises = prompts, default, normalises

    def prepare(self, request: Request) -> Prompt:
        """Tokenize a request; see `Engine.prepare`."""
        if request.max_frames is not None and request.max_frames < 1:
            raise ValueError(f"max_frames must be 1 or more, got {request.max_frames}")
        spoken = Segment(request.speaker, self.spoken_text(request))
        context = request.context if self._follows_context else None
        parts = self._prompts.build([*(context or ()), spoken])
        before = self._default if context is None else None
        prompt = Prompt.build(*parts, before)
        length = len(prompt.frames)
        if length >= self._max_positions:
            raise PromptTooLongError(
                f"the prompt takes {length} positions and must leave room for speech in the "
                f"model's context of {self._max_positions}"
            )
        return prompt

    def spoken_text(self, request: Request) -> str:
        """A request's text as the model reads it."""
        if request.normalise == "off" or not (request.normalise == "on" or self._normalises):
            return request.text
        if len(request.text) > CHARS_PER_POSITION * self._max_positions:
            return request.text  # `prepare` refuses it
        return normalise(request.text)
