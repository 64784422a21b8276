"""The Python API: `load` a voice, `say` a text, or `stream` it."""

import os
import threading
import warnings
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from vox_serve.config import Config, ConfigError, SpeechSettings
from vox_serve.text_bound import check_length

if TYPE_CHECKING:
    import numpy as np

    from vox_serve.engine import Engine, FrameOutput, Prompt, Request
    from vox_serve.long_form import LongForm
    from vox_serve.request import FinishReason

    Chunks = Generator[np.ndarray, None, FinishReason]


def load(model: str | os.PathLike[str] = "demo", **settings: Any) -> "Voice":
    """Load a voice.

    Environment variables (`VOX_SERVE_<FIELD>`) hold for settings that are not given, as they do
    for the commands. The backend and the number of CPU threads are set for the whole process.

    Args:
        model: built-in voice, local folder, or hub id such as "sesame/csm-1b".
        settings: the command line's settings by name, such as `dtype`, `quantize` or
            `temperature`; docs/settings.md lists them. The server's have no effect, except that
            `max_batch_size` limits the streams that advance together.

    Raises:
        ValueError: a setting is unknown or invalid, or the model does not fit; the message names
            it.
        OSError: the model, its codec or its context cannot be read or fetched.
    """
    # Read when torch is loaded: its idle threads would spin and take the kernels' cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = Config(model=os.fspath(model), **settings)
    return Voice(make_engine(config), config, config.max_text_chars)


class SpeechCutWarning(UserWarning):
    """Speech was cut, because the model did not end it."""


class Voice:
    """A loaded model that speaks. Several streams may be open at once, in several threads too.

    Each open stream gets the samples that it would get alone. Streams advance together: frames
    that a stream has not handed out yet stay in memory, 7.7 kB each.

    Args:
        engine: nothing else may call it.
        settings: the defaults of `say` and `stream`.
        max_text_chars: longest text, in characters.
    """

    def __init__(
        self,
        engine: "Engine | LongForm",
        settings: SpeechSettings,
        max_text_chars: int = Config.model_fields["max_text_chars"].default,
    ):
        self._engine = engine
        self._settings = settings
        self._max_text_chars = max_text_chars
        self._lock = threading.Lock()  # guards the engine, but for its `prepare`
        self._outputs: dict[str, deque[FrameOutput]] = {}
        self._left: deque[str] = deque()  # ids of closed streams, to be aborted

    @property
    def sample_rate_hz(self) -> int:
        return self._engine.sample_rate_hz

    def say(self, text: str, speaker: int = 0, **overrides: Any) -> "np.ndarray":
        """Speak a text.

        Args:
            text: the text; not blank.
            speaker: id of the speaker; the default voices are 0 and 1.
            overrides: settings for this call: `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `repetition_window`, `seed`, `max_frames`, `normalise`.

        Returns:
            `[N]` float32 samples at `sample_rate_hz`, in -1 to 1 or slightly beyond; N may be 0.

        Raises:
            ValueError: an argument is unknown or invalid, or the text too long for the model's
                context; the message names it.
            RuntimeError: the model produced numbers that are not finite.

        Warns:
            SpeechCutWarning: the speech did not end by itself: it reached `max_frames` ("length"),
                the end of the model's context ("context") or `max_silence_s` ("silence"). Its last
                10 ms are faded out. The finish reason of other speech is "stop".
        """
        import numpy as np

        chunks = self._start(text, speaker, overrides, stacklevel=3)
        return np.concatenate([np.zeros(0, np.float32), *chunks])

    def stream(self, text: str, speaker: int = 0, **overrides: Any) -> "Chunks":
        """Speak a text in chunks, as they are made; together they equal `say`'s samples.

        Arguments, errors and warnings are those of `say`. ValueError is raised by this call; the
        computation starts with the first chunk. Closing or dropping the generator aborts the rest.

        Yields:
            `[1920]` float32 samples, 80 ms.

        Returns:
            The generator's return value is the finish reason, as in `say`.
        """
        return self._start(text, speaker, overrides, stacklevel=2)

    def _start(
        self, text: str, speaker: int, overrides: dict[str, Any], stacklevel: int
    ) -> "Chunks":
        request = self._request(text, speaker, overrides)
        return self._run(request, self._engine.prepare(request), stacklevel)

    def _request(self, text: str, speaker: int, overrides: dict[str, Any]) -> "Request":
        from vox_serve.engine import Request

        if isinstance(text, str):
            check_length(text, self._max_text_chars)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text must be a string that is not blank, got {text!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("text must be valid Unicode, without lone surrogates")
        if type(speaker) is not int or speaker < 0:
            raise ValueError(f"speaker must be a whole number from 0, got {speaker!r}")
        speech = self._settings.override(**overrides)
        max_frames = overrides.get("max_frames") or self._settings.frames_for(text)
        return Request(
            text,
            speaker,
            sampling=speech.sampling,
            max_frames=max_frames,
            normalise=speech.normalise,
        )

    def _run(self, request: "Request", prompt: "Prompt", stacklevel: int) -> "Chunks":
        from vox_serve.ending import delivered_audio, why_cut

        outputs = self._outputs[request.id] = deque()
        num_frames = 0
        reason: FinishReason | None = None
        try:
            with self._lock:
                self._engine.add(request, prompt)
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
        for output in self._engine.step():
            if (outputs := self._outputs.get(output.request_id)) is not None:
                outputs.append(output)

    def _abort_left(self) -> None:
        while self._left:
            self._engine.abort(self._left.popleft())


def make_engine(config: Config, num_spare_rows: int = 0) -> "LongForm":
    """Load the engine that the settings describe; set the backend and the number of CPU threads.

    Args:
        config: all settings.
        num_spare_rows: see `Engine`.

    Raises:
        ConfigError: the backend is unavailable.
        ValueError, OSError: the model, its codec or the context is unavailable; one line says why.
    """
    import torch

    import voxkern
    from vox_serve.loading import load_engine
    from vox_serve.long_form import LongForm
    from voxkern.backend import why_missing

    force_backend(config)
    num_threads = config.num_threads
    if not why_missing("native", "cpu"):
        if num_threads is not None:
            voxkern.set_num_threads(num_threads)
        num_threads = voxkern.num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    engine = load_engine(num_spare_rows=num_spare_rows, **dict(config))
    return LongForm(engine, config.split_chars)


def force_backend(config: Config) -> None:
    """Force the backend of the settings, or else that of VOXKERN_BACKEND, for every op.

    Raises:
        ConfigError: it serves no device of the settings; the message says why.
    """
    import torch

    from voxkern import backend

    if config.backend != "auto":
        backend.force(config.backend)
    name = backend.forced()
    devices: list[str] = [config.device]
    if config.device == "auto":
        devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    reasons = [backend.why_missing(name, device) for device in devices] if name else []
    if reasons and all(reasons):
        origin = "VOXKERN_BACKEND=" if config.backend == "auto" else "--backend "
        raise ConfigError(f"{origin}{name}: {'; '.join(dict.fromkeys(map(str, reasons)))}")
