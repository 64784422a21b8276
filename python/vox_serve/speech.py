"""The Python API: `load` a voice, `say` a text, or `stream` it."""

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vox_serve.config import Config, ConfigError, SpeechSettings
from vox_serve.engine_streams import EngineStreams
from vox_serve.engine_streams import SpeechCutWarning as SpeechCutWarning
from vox_serve.text_bound import check_length

if TYPE_CHECKING:
    import numpy as np

    from vox_serve.dialogue import Dialogue
    from vox_serve.engine import Choose, Engine, Request
    from vox_serve.engine_streams import Chunks
    from vox_serve.long_form import LongForm
    from vox_serve.prompt import Segment
    from vox_serve.voice_maker import Audio


def load(model: str | os.PathLike[str] = "demo", **settings: Any) -> "Voice":
    """Load a voice.

    Environment variables (`VOX_SERVE_<FIELD>`) hold for settings that are not given, as they do
    for the commands. The backend and the number of CPU threads are set for the whole process.

    Args:
        model: built-in voice, local folder, or hub id such as "sesame/csm-1b".
        settings: the command line's settings by name, such as `dtype`, `quantize`,
            `temperature` or `voices`; docs/settings.md lists them. `watermark` and the server's
            have no effect, except that `max_batch_size` limits the streams that advance together.

    Raises:
        ValueError: a setting is unknown or invalid, or the model does not fit; the message names
            it.
        OSError: the model, its codec or its context cannot be read or fetched.
    """
    # Read when torch is loaded: its idle threads would spin and take the kernels' cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = Config(model=os.fspath(model), **settings)
    return Voice(make_engine(config), config, config.max_text_chars, config.voices)


class Voice:
    """A loaded model that speaks. Several streams may be open at once, in several threads too.

    Each open stream gets the samples that it would get alone. Streams advance together: frames
    that a stream has not handed out yet stay in memory, 7.7 kB each.

    Args:
        engine: nothing else may call it.
        settings: the defaults of `say` and `stream`.
        max_text_chars: longest text, in characters.
        voices: folder with the voices that can be named.
    """

    def __init__(
        self,
        engine: "Engine | LongForm",
        settings: SpeechSettings,
        max_text_chars: int = Config.model_fields["max_text_chars"].default,
        voices: str | None = None,
    ):
        self._engine = engine
        self._streams = EngineStreams(engine)
        self._settings = settings
        self._max_text_chars = max_text_chars
        self._folder = voices
        self._found: dict[str, tuple[int, Sequence[Segment]]] = {}  # voices by name

    @property
    def sample_rate_hz(self) -> int:
        return self._engine.sample_rate_hz

    def say(
        self,
        text: str,
        speaker: int | None = None,
        voice: str | None = None,
        context: "Sequence[Segment] | None" = None,
        **overrides: Any,
    ) -> "np.ndarray":
        """Speak a text.

        Args:
            text: the text; not blank.
            speaker: id of the speaker, by default 0; the default voices are 0 and 1.
            voice: name of a voice of the folder `voices`, a setting; it has a speaker. Its file is
                read once.
            context: earlier turns from `segment`, oldest first. They follow those of the voice, and
                replace the model's default context.
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

        request = self._request(text, overrides, speaker, voice, context)
        chunks = self._streams.run(request, self._engine.prepare(request), stacklevel=3)
        return np.concatenate([np.zeros(0, np.float32), *chunks])

    def stream(
        self,
        text: str,
        speaker: int | None = None,
        voice: str | None = None,
        context: "Sequence[Segment] | None" = None,
        **overrides: Any,
    ) -> "Chunks":
        """Speak a text in chunks, as they are made; together they equal `say`'s samples.

        Arguments, errors and warnings are those of `say`. ValueError is raised by this call; the
        computation starts with the first chunk. Closing or dropping the generator aborts the rest.

        Yields:
            `[1920]` float32 samples, 80 ms.

        Returns:
            The generator's return value is the finish reason, as in `say`.
        """
        request = self._request(text, overrides, speaker, voice, context)
        return self._streams.run(request, self._engine.prepare(request), stacklevel=2)

    def segment(self, text: str, audio: "Audio", speaker: int = 0) -> "Segment":
        """Encode a recording as context for `say` and `stream`. Any thread may call this.

        Args:
            text: what the recording says.
            audio: a file or its bytes, or `[S]` float samples at `sample_rate_hz`. Silence at both
                ends is removed, and a wrong level corrected.
            speaker: who says it.

        Raises:
            ValueError: an argument is invalid, or the model's codec has no encoder.
            OSError: the file cannot be read.
        """
        from vox_serve.voice_maker import VoiceMaker

        self._check_text(text)
        maker = VoiceMaker(self._engine.mimi, self._engine.prompts)
        return maker.segment(_checked_speaker(speaker), text, audio)

    def conversation(self, voice: str | None = None) -> "Dialogue":
        """Begin a conversation, of which each turn has the earlier ones as context.

        Args:
            voice: name of the voice that speaks; see `say`.
        """
        from vox_serve.dialogue import Dialogue

        if voice is not None:
            self._find(voice)
        return Dialogue(self._streams, partial(self._request, voice=voice), self.segment)

    def _request(
        self,
        text: str,
        overrides: dict[str, Any],
        speaker: int | None = None,
        voice: str | None = None,
        context: "Sequence[Segment] | None" = None,
    ) -> "Request":
        """The request of `say` with these arguments, checked."""
        from vox_serve.engine import Request

        self._check_text(text)
        if speaker is not None:
            _checked_speaker(speaker)
        if any(getattr(segment, "codes", None) is None for segment in context or ()):
            raise ValueError("context must be segments with speech, which `segment` makes")
        if voice is not None:
            own, segments = self._find(voice)
            if speaker not in (None, own):
                raise ValueError(f"speaker is {speaker}, but voice {voice} has speaker {own}")
            speaker = own
            if segments:
                context = [*segments, *(context or ())]
        speech = self._settings.override(**overrides)
        max_frames = overrides.get("max_frames") or self._settings.frames_for(text)
        return Request(
            text,
            speaker or 0,
            context,
            sampling=speech.sampling,
            max_frames=max_frames,
            normalise=speech.normalise,
        )

    def _check_text(self, text: str) -> None:
        if isinstance(text, str):
            check_length(text, self._max_text_chars)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text must be a string that is not blank, got {text!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("text must be valid Unicode, without lone surrogates")

    def _find(self, voice: str) -> "tuple[int, Sequence[Segment]]":
        """The speaker and the segments of a voice; see `find_voice`."""
        from vox_serve.voice_file import Sizes
        from vox_serve.voice_store import find_voice

        if not isinstance(voice, str):
            raise ValueError(f"voice must be a name, got {voice!r}")
        if (found := self._found.get(voice)) is None:
            config = self._engine.prompts.config
            found = find_voice(voice, self._folder, Sizes.of(config), config.num_speakers - 1)
            self._found[voice] = found
        return found


def _checked_speaker(speaker: int) -> int:
    if type(speaker) is not int or speaker < 0:
        raise ValueError(f"speaker must be a whole number from 0, got {speaker!r}")
    return speaker


def make_engine(
    config: Config,
    num_spare_rows: int = 0,
    choose: "Choose | None" = None,
    keeps_one: bool = False,
) -> "LongForm":
    """Load the engine that the settings describe; set the backend and the number of CPU threads.

    Args:
        config: all settings.
        num_spare_rows: see `Engine`.
        choose: see `Engine`; None for every request in every step.
        keeps_one: see `load_engine`.

    Raises:
        ConfigError: the backend is unavailable.
        ValueError, OSError: the model, its codec or the context is unavailable; one line says why.
    """
    import torch

    import voxkern
    from vox_serve.fifo import choose_all
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
    engine = load_engine(
        num_spare_rows=num_spare_rows,
        choose=choose or choose_all,
        keeps_one=keeps_one,
        **dict(config),
    )
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
