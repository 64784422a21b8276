"""Every setting, declared once.

Flags, environment variables, bounds, request fields and the documentation's table all come from
the fields of `Config`. A flag or keyword takes precedence over the environment variable
`VOX_SERVE_<FIELD>`, which takes precedence over the default. `python -m vox_serve.config` prints
the table.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from vox_serve.model_settings import DEFAULT_CODEC as DEFAULT_CODEC
from vox_serve.model_settings import ModelSettings as ModelSettings
from vox_serve.setting import (
    TYPE_WORDS,
    Secret,
    Settings,
    Shown,
    base_type,
    is_secret,
    limits,
    reason,
    setting,
    shown,
    shown_default,
)
from vox_serve.setting import ConfigError as ConfigError
from vox_serve.text_bound import frames_bound

ENV_PREFIX = "VOX_SERVE_"
DEFAULT_MAX_FRAMES = 1125  # 90 s, Sesame's own limit
DEFAULT_FRAMES_LIMIT = 2048
DEFAULT_MAX_SPEAKER = 1
MAX_FRAMES = 1_000_000  # 22 hours

Normalise = Literal["auto", "on", "off"]


def random_seed() -> int:
    """A fresh seed, 0 to 2^63 - 1."""
    return int.from_bytes(os.urandom(8)) >> 1


class SamplingParams(Settings):
    """One request's sampling parameters; `voxkern.ops.sample_tokens` defines each of them."""

    temperature: float = setting(0.9, "randomness of the draw; 0 is greedy", ge=0, le=100)
    top_k: Annotated[int, Shown(limits="0 or more")] = setting(
        50, "most likely codes to keep; 0 keeps all", ge=0, le=2**31 - 1
    )
    top_p: float = setting(1.0, "probability mass to keep", gt=0, le=1)
    min_p: float = setting(
        0.0, "lowest probability of a code, as a share of the largest", ge=0, le=1
    )
    repetition_penalty: float = setting(
        1.0, "CTRL's penalty, on codebook 0; 1 is none", ge=0.01, le=100
    )
    repetition_window: int = setting(16, "frames that the penalty looks back", ge=1, le=2048)
    seed: Annotated[int | None, Shown("a new one for every request", "a signed 64-bit integer")] = (
        setting(None, "the same seed gives the same speech", ge=-(2**63), le=2**63 - 1)
    )


class SpeechSettings(SamplingParams):
    """The settings that a request may override."""

    title = "sampling (a request may override each of these)"

    max_frames: Annotated[int, Shown("`1125` in each part, or fewer by the text's length")] = (
        setting(DEFAULT_MAX_FRAMES, "longest speech, in frames of 80 ms", ge=1, le=MAX_FRAMES)
    )
    normalise: Normalise = setting(
        "auto",
        "write numbers, dates, units, addresses, ... of a text as English words; auto is on for "
        "the built-in voice and off for other models, since CSM-1B was trained on raw transcripts",
    )

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(**self.model_dump(include=set(SamplingParams.model_fields)))

    def frames_for(self, text: str) -> int:
        """The `max_frames` of a request that sets none."""
        return self.max_frames

    def override(self, **values: Any) -> "SpeechSettings":
        """These settings with a request's own values; None keeps the setting.

        Raises:
            ConfigError: see `Settings`.
        """
        given = {name: value for name, value in values.items() if value is not None}
        return SpeechSettings(**self.model_dump(include=set(SpeechSettings.model_fields)) | given)


class VoiceSettings(Settings):
    title = "voices"

    voices: Annotated[str | None, Shown("none: voices end with the server")] = setting(
        None, "folder that keeps the voices that are added, a safetensors file each"
    )
    max_voices: int = setting(
        256, "most voices that may be kept; they take 256 MiB at most", ge=0, le=10_000
    )


class OutputSettings(Settings):
    title = "audio"

    watermark: bool = setting(
        False, "mark speech inaudibly as synthetic; needs the package resemble-perth"
    )


class ServerSettings(VoiceSettings):
    title = "server"

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 takes a free one", ge=0, le=65535)
    root_path: Annotated[str | None, Shown("none")] = setting(
        None, "path at which a proxy shows this server, such as /tts; it may send it on or not"
    )
    max_batch_size: Annotated[
        int | None,
        Shown("32; 8 with `--policy fifo` and in Python; on a GPU 64; fewer in a small memory"),
    ] = setting(None, "requests spoken at the same time", ge=1, le=16384)
    policy: Literal["deadline", "fifo"] = setting(
        "deadline",
        "who is in a step: deadline keeps listeners from gaps, and takes a stream only if that "
        "stays so; fifo gives everybody a frame in each step",
    )
    max_wait_s: float = setting(
        30.0,
        "a stream that would begin later than this is answered 429 at once (deadline)",
        ge=0,
        le=86400,
    )
    max_queue_size: int = setting(
        64, "requests that may wait; more are answered 429", ge=0, le=100_000
    )
    max_frames_limit: Annotated[int | None, Shown("`--max_frames` if that is given, else 2048")] = (
        setting(None, "highest `max_frames` that a request may ask for", ge=1, le=MAX_FRAMES)
    )
    max_body_bytes: int = setting(
        262_144, "longest request body; a longer one is answered 413", ge=1024, le=2**30
    )
    max_upload_bytes: int = setting(
        2**25,
        "longest body of a request with recordings; a longer one is answered 413",
        ge=1024,
        le=2**30,
    )
    max_conversations: int = setting(
        1000,
        "most conversations; a new one takes the place of the one that was idle for longest",
        ge=1,
        le=100_000,
    )
    conversation_idle_s: float = setting(
        3600.0, "a conversation that nobody uses for this long is deleted", gt=0, le=10_000_000
    )
    max_unread_bytes: int = setting(
        2**28, "audio that waits for its readers, all clients together", ge=2**16, le=2**40
    )
    stall_timeout_s: float = setting(
        30.0, "a client that takes none of its audio for this long is dropped", gt=0, le=86400
    )
    warm_up_s: Annotated[float | None, Shown("0.2 on a CPU, 1 on a GPU")] = setting(
        None,
        "time for trial steps at the start, after which the server is ready; 0 for none",
        ge=0,
        le=3600,
    )
    drain_s: float = setting(
        30.0, "time that SIGTERM gives speech to finish; a second signal gives none", ge=0, le=86400
    )
    max_connections: Annotated[
        int | None, Shown("4096, or as many as the limit on open files permits")
    ] = setting(
        None,
        "connections at a time; a new one takes the place of the one silent for longest",
        ge=1,
        le=1_000_000,
    )
    max_live_connections: int = setting(
        512,
        "WebSockets at a time, and at most half of all connections; more are answered 429",
        ge=1,
        le=1_000_000,
    )
    live_idle_s: float = setting(
        300.0, "a WebSocket without messages and turns is closed after this time", gt=0, le=86400
    )
    live_text_timeout_s: float = setting(
        20.0, "a turn of a WebSocket that gets no text for so long is complete", gt=0, le=86400
    )
    header_timeout_s: float = setting(
        10.0, "a request's head must arrive within this time", gt=0, le=86400
    )
    body_timeout_s: float = setting(
        30.0, "a request's body must arrive within this time, or at 16 KiB/s", gt=0, le=86400
    )
    keep_alive_s: float = setting(
        5.0, "an idle connection is closed after this time", gt=0, le=86400
    )
    api_key: Annotated[str | None, Shown("none: everybody may use the server"), Secret()] = setting(
        None,
        "keys of which a client sends one (Authorization: Bearer, or X-API-Key), comma-separated; "
        "/health needs none; better set as VOX_SERVE_API_KEY, since other users see flags",
    )
    cors_origins: Annotated[str | None, Shown("none")] = setting(
        None, "origins whose web pages may use the server, comma-separated; * for all"
    )
    allowed_hosts: Annotated[
        str | None, Shown("on loopback names of this machine or network, else all")
    ] = setting(None, "names that a request's Host may have, comma-separated; * for all")
    max_errors_per_s: float = setting(
        50.0,
        "4xx answers a second to one client; further ones wait, up to 10 s; 0 for no limit",
        ge=0,
        le=1_000_000,
    )
    max_cancels_per_s: float = setting(
        10.0,
        "answers a second that one client may give up or interrupt; after a burst its further "
        "requests wait, up to 10 s; 0 for no limit",
        ge=0,
        le=1_000_000,
    )
    log_level: Literal["error", "warning", "info", "debug"] = setting(
        "info", "least severe messages to log"
    )
    log_format: Literal["text", "json"] = setting(
        "text", "lines of the log: text, or one JSON object each"
    )


class Config(BaseSettings, ServerSettings, OutputSettings, SpeechSettings, ModelSettings):
    """The settings of `vox-serve`, `say` and `vox_serve.load`.

    Keywords take precedence over environment variables.

    Raises:
        ConfigError: see `Settings`; for a variable the message names it.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True)

    def frames_for(self, text: str) -> int:
        """The `max_frames` of a request that sets none: the setting if that was given, else no more
        than the text can take. A text that is split has the default for each of its parts."""
        if "max_frames" in self.model_fields_set:
            return self.max_frames
        is_split = self.split_chars and len(text) > self.split_chars
        most = MAX_FRAMES if is_split else self.max_frames
        return min(most, frames_bound(text)) if self.max_silence_s else most

    @property
    def speaker_limit(self) -> int:
        """The highest `speaker` of a request."""
        return DEFAULT_MAX_SPEAKER if self.max_speaker is None else self.max_speaker

    def for_speakers(self, num_speakers: int) -> "Config":
        """The settings for a model of so many speakers; `max_speaker` stays if it is set."""
        if self.max_speaker is not None:
            return self
        return self.model_copy(update={"max_speaker": num_speakers - 1})

    @property
    def frames_limit(self) -> int:
        """The highest `max_frames` of a request."""
        if self.max_frames_limit is not None:
            return self.max_frames_limit
        if "max_frames" in self.model_fields_set:
            return self.max_frames
        return DEFAULT_FRAMES_LIMIT

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls)


class _Environment(EnvSettingsSource):
    """Environment variables as typed values, for the fields that no keyword sets."""

    def __call__(self) -> dict[str, Any]:
        values = {}
        for name in Config.model_fields.keys() - self.current_state.keys():
            variable = ENV_PREFIX + name.upper()
            if os.environ.get(variable) == "" and is_secret(Config.model_fields[name]):
                # Taken for "not set", an unset variable in a script would open the server.
                raise ConfigError(f"environment variable {variable}: must not be empty")
            if text := self.env_vars.get(variable.lower()):
                try:
                    values[name] = parse_value(name, text)
                except ConfigError as error:
                    raise ConfigError(f"environment variable {variable}: {error}") from None
        return values


def parse_value(name: str, text: str) -> Any:
    """Convert the text of a flag or variable to the setting's type.

    Raises:
        ConfigError: it is of another type, or out of bounds. The message does not name the field.
    """
    field = Config.model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    try:
        return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_strings(text)
    except ValidationError as errors:
        raise ConfigError(reason("must be", field, errors.errors()[0])) from None


def markdown_table() -> str:
    """All settings as one Markdown table."""
    lines = ["| flag | default | values | effect |", "| --- | --- | --- | --- |"]
    for name, field in Config.model_fields.items():
        default = shown(field).default or f"`{shown_default(field)}`"
        values = limits(field) or TYPE_WORDS[base_type(field)]
        lines.append(f"| `--{name}` | {default} | {values} | {field.description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from voxkern.console import quiet_on_closed_pipe

    with quiet_on_closed_pipe():
        print(markdown_table())
