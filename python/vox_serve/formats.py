"""The audio formats of answers: their names, media types, sample rates and file endings."""

from collections.abc import Sequence
from dataclasses import dataclass

from vox_serve.json_file import shown

SAMPLE_RATE_HZ = 24_000
"""Sample rate of speech as it is made."""

MIN_SPEED, MAX_SPEED = 0.25, 4.0


@dataclass(frozen=True)
class Format:
    """An audio format, always mono.

    Attributes:
        name: as in `response_format` of OpenAI's API; also the ending of files.
        media_type: of HTTP answers.
        rates_hz: possible sample rates, the default first.
        is_compressed: a codec makes it, which takes about a millisecond for a frame of speech.
    """

    name: str
    media_type: str
    rates_hz: tuple[int, ...] = (SAMPLE_RATE_HZ,)
    is_compressed: bool = False


_PCM_RATES_HZ = (SAMPLE_RATE_HZ, 8000, 16_000, 48_000)

FORMATS = {
    format.name: format
    for format in (
        Format("wav", "audio/wav", _PCM_RATES_HZ),
        Format("pcm", "audio/pcm", _PCM_RATES_HZ),
        Format("mp3", "audio/mpeg", is_compressed=True),
        Format("opus", "audio/ogg", is_compressed=True),
        Format("aac", "audio/aac", is_compressed=True),
        Format("flac", "audio/flac", is_compressed=True),
        Format("ulaw", "audio/basic", (8000,)),
    )
}
"""All formats by name. opus is in Ogg pages, aac in ADTS frames; pcm and ulaw have no header."""

_OTHER_NAMES = {
    "audio/x-wav": "wav",
    "audio/wave": "wav",
    "audio/vnd.wave": "wav",
    "audio/mp3": "mp3",
    "audio/opus": "opus",
    "application/ogg": "opus",
    "audio/aacp": "aac",
    "audio/x-flac": "flac",
}
_BY_MEDIA_TYPE = {format.media_type: format.name for format in FORMATS.values()} | _OTHER_NAMES
_BY_ENDING = {name: name for name in FORMATS} | {"wave": "wav", "ogg": "opus", "ul": "ulaw"}


class FormatError(ValueError):
    """There is no such format, or not with this sample rate.

    Attributes:
        param: the field that is wrong: "format" or "sample_rate".
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Output:
    """The audio that a client gets.

    Attributes:
        format: its format.
        rate_hz: its sample rate.
        speed: tempo relative to the speech as it is made; the pitch stays.
        watermark: it has an inaudible watermark (see watermark.py).
    """

    format: Format = FORMATS["wav"]
    rate_hz: int = SAMPLE_RATE_HZ
    speed: float = 1.0
    watermark: bool = False

    @classmethod
    def of(
        cls, name: str, rate_hz: int | None = None, speed: float = 1.0, watermark: bool = False
    ) -> "Output":
        """An output by its format's name.

        Args:
            name: the format.
            rate_hz: the sample rate; None for the format's default.
            speed: see `Output`, `MIN_SPEED` to `MAX_SPEED`.
            watermark: see `Output`.

        Raises:
            FormatError: the format is unknown, or has no such sample rate.
        """
        format = FORMATS.get(name)
        if format is None:
            raise FormatError(
                "format", f"{name[:100]!r} is no supported format: use {_words(FORMATS)}"
            )
        if rate_hz is None:
            rate_hz = format.rates_hz[0]
        if rate_hz not in format.rates_hz:
            rates = _words(sorted(format.rates_hz))
            message = f"{name} has no sample rate of {shown(rate_hz)} Hz: use {rates}"
            raise FormatError("sample_rate", message)
        return cls(format, rate_hz, speed, watermark)

    @property
    def is_plain(self) -> bool:
        """True for the samples as they are made."""
        return self.rate_hz == SAMPLE_RATE_HZ and self.speed == 1.0 and not self.watermark


WAV = Output()
"""Speech as it is made, as a WAV."""


def format_of_ending(path: str) -> str | None:
    """The format that the ending of a file's name stands for, if any."""
    _, dot, ending = path.rpartition(".")
    return _BY_ENDING.get(ending.lower()) if dot else None


def format_of_accept(header: str) -> str | None:
    """The first of the formats that an Accept header prefers; None if it names none of them.

    Ranges like `audio/*` name none: they accept the default.
    """
    best_name, best_quality = None, 0.0
    for entry in header.split(",")[:64]:
        media_type, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        if (name := _BY_MEDIA_TYPE.get(media_type)) and quality > best_quality:
            best_name, best_quality = name, quality
    return best_name


def _words(values: Sequence[object] | dict[str, Format]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
