"""The fields of a request for speech, and their schemas."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator
from pydantic.fields import FieldInfo

from vox_serve import engine
from vox_serve.config import DEFAULT_MAX_SPEAKER, MAX_FRAMES, Config, SpeechSettings
from vox_serve.context_field import ContextField
from vox_serve.conversations import ID_PATTERN
from vox_serve.formats import FORMATS, MAX_SPEED, MIN_SPEED, Output
from vox_serve.job import RequestRefused
from vox_serve.json_file import shown


class Utterance(BaseModel):
    """A text to say. Fields that are not given take the server's defaults."""

    # Without `forbid` a misspelt field would be ignored silently.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    text: str = Field(
        description="text to say, not blank", min_length=1, json_schema_extra={"pattern": r"\S"}
    )
    speaker: int = Field(default=0, description="id of the speaker", ge=0)
    voice: str | None = Field(
        default=None, description="name of a voice, instead of a speaker", min_length=1
    )
    context: ContextField | None = Field(
        default=None, description="earlier turns with their speech, before this text"
    )
    conversation: str | None = Field(
        default=None,
        description="id of the conversation that this text continues",
        json_schema_extra={"pattern": f"^{ID_PATTERN}$"},
    )
    streaming: bool = Field(default=False, description="send the audio as it is made")
    format: str | None = Field(
        default=None, description="audio format", json_schema_extra={"enum": [*FORMATS, None]}
    )
    sample_rate: int | None = Field(
        default=None,
        description="sample rate of wav or pcm, in Hz",
        json_schema_extra={"enum": [*sorted(FORMATS["pcm"].rates_hz), None]},
    )
    speed: float | None = Field(
        default=None, description="tempo of the speech", ge=MIN_SPEED, le=MAX_SPEED
    )

    @field_validator("text")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("must not be blank")
        return text

    def output(self, default: str = "wav", watermark: bool = False) -> Output:
        """The audio that is wanted.

        Args:
            default: the format if none is given.
            watermark: whether this server marks its speech.

        Raises:
            FormatError: there is none like this.
        """
        speed = 1.0 if self.speed is None else self.speed
        return Output.of(self.format or default, self.sample_rate, speed, watermark)

    def to_engine(self, config: Config) -> engine.Request:
        """Convert to the engine's request; `config` has the defaults.

        Raises:
            RequestRefused: `max_frames` is above the server's limit.
        """
        overrides = self.model_dump(exclude=set(Utterance.model_fields))
        limit = config.frames_limit
        if (overrides["max_frames"] or 0) > limit:
            raise RequestRefused(
                f"max_frames must be at most {limit} on this server, "
                f"got {shown(overrides['max_frames'])}"
            )
        overrides["max_frames"] = overrides["max_frames"] or min(
            config.frames_for(self.text), config.max_frames_limit or MAX_FRAMES
        )
        speech = config.override(**overrides)
        return engine.Request(
            text=self.text,
            speaker=self.speaker,
            sampling=speech.sampling,
            max_frames=speech.max_frames,
            normalise=speech.normalise,
            speed=1.0 if self.speed is None else self.speed,
        )


def override(field: FieldInfo) -> Any:
    """A request's field that overrides a setting, with the setting's bounds."""
    kind: Any = field.annotation
    if field.metadata:
        kind = Annotated[kind, *field.metadata]
    return kind | None, Field(default=None, description=field.description)


@cache
def request_model(max_speaker: int) -> Any:
    """The fields of /generate, on a server with speakers up to `max_speaker`."""
    fields = {name: override(field) for name, field in SpeechSettings.model_fields.items()}
    speaker = Utterance.model_fields["speaker"]
    bounded = Field(default=0, description=speaker.description, ge=0, le=max_speaker)
    return create_model(
        "GenerateRequest",
        __base__=Utterance,
        __doc__=Utterance.__doc__,
        speaker=(int, bounded),
        **fields,
    )


GenerateRequest = request_model(DEFAULT_MAX_SPEAKER)


def form_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a form with the fields of a JSON schema: it has no null."""

    def without_null(field: Mapping[str, Any]) -> dict[str, Any]:
        kinds = [kind for kind in field.get("anyOf", []) if kind != {"type": "null"}]
        rest = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
        return {**rest, **kinds[0]} if kinds else dict(field)

    fields = {name: without_null(field) for name, field in schema["properties"].items()}
    fields["context"] = {"type": "string", "contentMediaType": "application/json"}
    return {**schema, "properties": fields}
