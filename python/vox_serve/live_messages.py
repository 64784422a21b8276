"""The messages of the WebSocket: what a client may send, checked, and what it gets."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from vox_serve import engine
from vox_serve.config import MAX_FRAMES, Config, SpeechSettings
from vox_serve.conversations import ID_PATTERN
from vox_serve.formats import FormatError, Output
from vox_serve.part_feed import PartFeed
from vox_serve.speech_fields import override

MAX_PLAYED_MS = 10**10
MAX_SHOWN_CHARS = 200


class MessageError(ValueError):
    """A message, or a turn, is refused.

    Attributes:
        field: of the message, or its type.
        retry_after_s: the time after which a new attempt is sensible; None if it never is.
    """

    def __init__(
        self, message: str, field: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_s = retry_after_s


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Session(_Strict):
    """The settings of a client's turns. Fields that are not given take the server's defaults."""

    speaker: int | None = Field(default=None, ge=0)
    voice: str | None = Field(default=None, min_length=1)
    conversation: str | None = Field(default=None, pattern=f"^{ID_PATTERN}$")
    format: str = "pcm"
    sample_rate: int | None = None
    part_chars: int = Field(default=0, ge=0, le=2**30)


Session: Any = create_model(
    "Session",
    __base__=_Session,
    **{name: override(field) for name, field in SpeechSettings.model_fields.items()},
)


class Text(_Strict):
    text: str


class Empty(_Strict):
    pass


class Cancel(_Strict):
    played_ms: float | None = Field(default=None, ge=0, le=MAX_PLAYED_MS)


KINDS: dict[str, type[BaseModel]] = {
    "session": Session,
    "text": Text,
    "flush": Empty,
    "end": Empty,
    "cancel": Cancel,
    "close": Empty,
}
ALIASES = {"init": "session"}


def parse(message: str) -> tuple[str, dict[str, Any]]:
    """The type and the fields of a message, checked; null stands for a field that is left out.

    Raises:
        MessageError: it is no message of the protocol.
    """
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError):
        raise MessageError("the message is not JSON") from None
    if not isinstance(fields, dict):
        raise MessageError("the message must be a JSON object")
    kind = fields.pop("type", None)
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else None
    if kind not in KINDS:
        raise MessageError(f"type must be one of {', '.join(KINDS)}", "type")
    given = {name: value for name, value in fields.items() if value is not None}
    checked(KINDS[kind], given)
    return kind, fields


def checked(model: Any, given: Mapping[str, Any]) -> Any:
    """A model of some fields.

    Raises:
        MessageError: a field is wrong; names the first such field.
    """
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part)[:100] for part in first["loc"]) or "text"
        raise MessageError(f"{name}: {first['msg']}"[:MAX_SHOWN_CHARS], name) from None


def merged(given: Mapping[str, Any], fields: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """A session's fields after a message that changes some; null takes the default again.

    Raises:
        MessageError: `max_frames` or `speaker` is above the server's limit.
    """
    fields = {n: v for n, v in {**given, **fields}.items() if v is not None}
    limit = config.frames_limit
    if fields.get("max_frames", 0) > limit:
        raise MessageError(f"max_frames must be at most {limit} on this server", "max_frames")
    if fields.get("speaker", 0) > (limit := config.speaker_limit):
        raise MessageError(f"speaker must be at most {limit} on this server", "speaker")
    return fields


def output_of(session: Any, watermark: bool = False) -> Output:
    """The audio that a session's client gets.

    Args:
        session: its settings.
        watermark: whether this server marks its speech.

    Raises:
        MessageError: there is no such format, or it cannot be made here.
    """
    try:
        output = Output.of(session.format, session.sample_rate, watermark=watermark)
        if output.format.is_compressed:
            import vox_serve.codec_encoders  # noqa: F401 - it may be missing
    except FormatError as error:
        raise MessageError(str(error), error.param) from None
    except ImportError:
        raise MessageError(f"{session.format} needs PyAV, which is missing", "format") from None
    return output


def to_request(session: Any, feed: PartFeed, config: Config) -> engine.Request:
    """The engine's request for a turn; `config` has the defaults."""
    names = SpeechSettings.model_fields
    speech = config.override(**{name: getattr(session, name) for name in names})
    max_frames = session.max_frames
    if max_frames is None:  # each part has its own bound
        is_set = "max_frames" in config.model_fields_set
        most = config.max_frames if is_set else MAX_FRAMES
        max_frames = min(most, config.max_frames_limit or MAX_FRAMES)
    return engine.Request(
        text=feed[0],
        speaker=session.speaker or 0,
        sampling=speech.sampling,
        max_frames=max_frames,
        normalise=speech.normalise,
        feed=feed,
    )
