"""Several streams of speech from one engine, without a server."""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from vox_serve.ending import delivered_audio, why_cut

if TYPE_CHECKING:
    import numpy as np

    from vox_serve.engine import Engine, FrameOutput, Prompt, Request
    from vox_serve.long_form import LongForm
    from vox_serve.request import FinishReason

    Chunks = Generator[np.ndarray, None, FinishReason]


class SpeechCutWarning(UserWarning):
    """Speech was cut, because the model did not end it."""


class EngineStreams:
    """Streams that advance together, in several threads too.

    Args:
        engine: nothing else may call it, except its `prepare`.
    """

    def __init__(self, engine: "Engine | LongForm") -> None:
        self.engine = engine
        self._lock = threading.Lock()  # guards the engine, but for its `prepare`
        self._outputs: dict[str, deque[FrameOutput]] = {}
        self._left: deque[str] = deque()  # ids of closed streams, to be aborted

    def run(
        self,
        request: "Request",
        prompt: "Prompt",
        stacklevel: int,
        take: "Callable[[FrameOutput], object]" = lambda output: None,
    ) -> "Chunks":
        """Run a request, from the first chunk on; closing the generator aborts it.

        Args:
            request: the request.
            prompt: the engine's `prepare` of it.
            stacklevel: of a warning, from this generator's frame.
            take: gets each frame before its chunk.

        Yields:
            `[1920]` float32 samples.

        Returns:
            The finish reason.

        Raises:
            ValueError: the rest of the text cannot be spoken.
            RuntimeError: the model produced numbers that are not finite.

        Warns:
            SpeechCutWarning: the speech did not end by itself.
        """
        outputs = self._outputs[request.id] = deque()
        num_frames = 0
        reason: FinishReason | None = None
        try:
            with self._lock:
                self.engine.add(request, prompt)
            while reason is None:
                with self._lock:
                    while not outputs:
                        self._step()
                    output = outputs.popleft()
                reason = output.finish_reason
                if reason == "error":
                    raise (ValueError if output.is_refused else RuntimeError)(output.error)
                if (audio := delivered_audio(output)) is not None:
                    num_frames += 1
                    take(output)
                    yield audio
            if cut := why_cut(reason, num_frames):
                warnings.warn(f"speech was {cut}", SpeechCutWarning, stacklevel=stacklevel)
            return reason
        finally:
            del self._outputs[request.id]
            self._left.append(request.id)
            # Garbage collection may run this within a step: then the next step aborts the request.
            if self._lock.acquire(blocking=False):
                self._abort_left()
                self._lock.release()

    def _step(self) -> None:
        self._abort_left()
        for output in self.engine.step():
            if (outputs := self._outputs.get(output.request_id)) is not None:
                outputs.append(output)

    def _abort_left(self) -> None:
        while self._left:
            self.engine.abort(self._left.popleft())
