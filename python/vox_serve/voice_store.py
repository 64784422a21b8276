"""Voices that were added: encoded recordings with their transcripts, a safetensors file each."""

import contextlib
import fcntl
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save

from vox_serve.atomic_file import replaced
from vox_serve.json_file import parse_json, read_bounded
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import Segment

logger = logging.getLogger("vox_serve")

BUILT_IN = ("0", "1")
"""Names of the model's own two speakers, which no store holds."""

NAME_PATTERN = r"(?![0-9]+$)[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""A name that is a file's name in any folder. Digits alone would be a speaker."""
NAME_RULE = "1 to 64 letters a-z, digits, - or _, not - or _ first, not digits alone"

MAX_RECORDINGS = 16
MAX_FILE_BYTES = 8 << 20
MAX_TOTAL_BYTES = 2**28

_SUFFIX = ".safetensors"
_FORMAT = 1
_METADATA_KEY = "voxkern_voice"
_DTYPES = {"I16": np.dtype("<i2"), "I32": np.dtype("<i4")}

Count = Annotated[int, Field(ge=1, lt=2**31)]


class VoiceError(ValueError):
    """An invalid voice or name; the message says which."""


class UnknownVoiceError(VoiceError):
    """There is no such voice."""


class VoiceExistsError(VoiceError):
    """There is such a voice already."""


class StoreFullError(VoiceError):
    """The store holds as many voices, or bytes, as it may."""


class Sizes(NamedTuple):
    """The sizes that a voice shares with the model that speaks it."""

    num_codebooks: int
    audio_vocab_size: int

    @classmethod
    def of(cls, config: CsmConfig) -> "Sizes":
        return cls(config.num_codebooks, config.audio_vocab_size)


@dataclass(frozen=True)
class Voice:
    """A voice.

    Attributes:
        name: as it was given; names that differ by case alone are the same voice.
        speaker: the speaker of all segments, 0 or more.
        segments: the recordings, codes `[N, K]` int64, with their transcripts.
        sizes: of the model that it was made for.
        created: Unix time, in whole seconds.
        frame_s: duration of a frame.
        levels_dbfs: level of each segment's speech; None where it is not known.
        preview: `[S]` int16, the beginning of the decoded codes.
        sample_rate_hz: of the preview.
    """

    name: str
    speaker: int
    segments: tuple[Segment, ...]
    sizes: Sizes
    created: int
    frame_s: float
    levels_dbfs: tuple[float | None, ...]
    preview: np.ndarray
    sample_rate_hz: int

    def seconds(self, segment: Segment) -> float:
        """Duration of one of the segments."""
        assert segment.codes is not None
        return round(len(segment.codes) * self.frame_s, 3)


class _SegmentInfo(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    transcript: str = Field(min_length=1)
    level_dbfs: float | None = None


class _Info(BaseModel):
    """The metadata of a voice's file."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    format: int
    name: str
    speaker: int = Field(ge=0, lt=2**31)
    created: int = Field(ge=0, lt=2**53)
    num_codebooks: Count
    audio_vocab_size: Count
    frame_s: float = Field(gt=0, le=10)
    sample_rate_hz: Count
    segments: list[_SegmentInfo] = Field(min_length=1, max_length=MAX_RECORDINGS)


def voice_key(name: str) -> str:
    """The name by which a voice is stored: in lower case, since not all file systems tell cases
    apart.

    Raises:
        VoiceError: no voice can have this name.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise VoiceError(f"a voice's name must be {NAME_RULE}, got {name[:100]!a}")
    return name.lower()


def voice_to_bytes(voice: Voice) -> bytes:
    """The content of a voice's file."""
    segments = [
        _SegmentInfo(transcript=segment.text, level_dbfs=level)
        for segment, level in zip(voice.segments, voice.levels_dbfs, strict=True)
    ]
    info = _Info(
        format=_FORMAT,
        name=voice.name,
        speaker=voice.speaker,
        created=voice.created,
        frame_s=voice.frame_s,
        sample_rate_hz=voice.sample_rate_hz,
        segments=segments,
        **voice.sizes._asdict(),
    )
    dtype: Any = _DTYPES["I16" if voice.sizes.audio_vocab_size <= 2**15 else "I32"]
    tensors = {"preview": np.ascontiguousarray(voice.preview, dtype="<i2")}
    for i, segment in enumerate(voice.segments):
        assert segment.codes is not None
        tensors[f"codes.{i}"] = segment.codes.numpy().astype(dtype)
    return save(tensors, metadata={_METADATA_KEY: json.dumps(info.model_dump())})


def voice_from_bytes(data: bytes) -> Voice:
    """A voice from the content of its file.

    Raises:
        VoiceError: it holds no voice; the message says why.
    """
    try:
        tensors = {
            name: _array(name, tensor)
            for name, tensor in safetensors.deserialize(data)
            if name == "preview" or name.startswith("codes.")
        }
        # The library has checked the header's length.
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = (header.get("__metadata__") or {}).get(_METADATA_KEY)
        if text is None:
            raise VoiceError(f"it is no voice: its metadata has no {_METADATA_KEY}")
        value = parse_json(text.encode())
        version = value.get("format") if isinstance(value, dict) else None
        if version != _FORMAT:
            raise VoiceError(f"it has format {version!r:.100}, this version reads {_FORMAT}")
        info = _Info.model_validate(value)
    except safetensors.SafetensorError as error:
        raise VoiceError(f"it is no safetensors file: {error}") from None
    except ValidationError as errors:
        first = errors.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise VoiceError(f"{where}: {first['msg'].lower()}") from None
    except VoiceError:
        raise
    except ValueError as error:
        raise VoiceError(f"its metadata cannot be read: {error}") from None
    sizes = Sizes(info.num_codebooks, info.audio_vocab_size)
    segments = []
    for i, segment in enumerate(info.segments):
        codes = tensors.get(f"codes.{i}")
        if codes is None:
            raise VoiceError(f"codes.{i} is missing")
        if codes.ndim != 2 or codes.shape[1] != sizes.num_codebooks or not len(codes):
            raise VoiceError(
                f"codes.{i} must be [N, {sizes.num_codebooks}], but is {list(codes.shape)}"
            )
        if not 0 <= codes.min() <= codes.max() < sizes.audio_vocab_size:
            raise VoiceError(f"codes.{i} must be 0 to {sizes.audio_vocab_size - 1}")
        if not segment.transcript.strip():
            raise VoiceError(f"segments.{i}.transcript must not be blank")
        tensor = torch.from_numpy(codes.astype(np.int64))
        segments.append(Segment(info.speaker, segment.transcript, tensor))
    preview = tensors.get("preview")
    if preview is None or preview.ndim != 1 or preview.dtype != np.int16:
        raise VoiceError("preview must be int16 [S]")
    return Voice(
        name=info.name,
        speaker=info.speaker,
        segments=tuple(segments),
        sizes=sizes,
        created=info.created,
        frame_s=info.frame_s,
        levels_dbfs=tuple(segment.level_dbfs for segment in info.segments),
        preview=preview,
        sample_rate_hz=info.sample_rate_hz,
    )


def _array(name: str, tensor: dict[str, Any]) -> np.ndarray:
    dtype: Any = _DTYPES.get(tensor["dtype"])
    if dtype is None:
        raise VoiceError(f"{name} has dtype {tensor['dtype']}, expected I16 or I32")
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])


class _Entry(NamedTuple):
    """A voice, or why there is none, and the file's status when it was read."""

    signature: tuple[int, ...]
    voice: Voice | VoiceError
    num_bytes: int


class VoiceStore:
    """Voices by name, in a folder or in memory. Any thread may use it.

    Other processes may use the same folder: files are written whole, changes take a lock, and
    reading follows the files as they are.

    Args:
        folder: holds `NAME.safetensors` for each voice, and is made if it is missing; None for
            voices that end with the process.
        sizes: of the model; None to accept voices of all models.
        max_voices: most voices.

    Raises:
        VoiceError: the folder cannot be made or read.
    """

    def __init__(
        self, folder: Path | str | None, sizes: Sizes | None = None, max_voices: int = 256
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.sizes = sizes
        self.max_voices = max_voices
        self._entries: dict[str, _Entry] = {}  # by key; of a folder those that were read
        self._lock = threading.RLock()
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
                self.voices()
            except OSError as error:
                raise VoiceError(
                    f"voices: folder {self.folder} cannot be used: {error.strerror}"
                ) from None

    def names(self) -> list[str]:
        """The names in lower case, sorted, including those of files that cannot be used."""
        if self.folder is None:
            with self._lock:
                return sorted(self._entries)
        files = {path.stem for path in self.folder.glob(f"*{_SUFFIX}") if path.is_file()}
        return sorted(
            key for key in files if re.fullmatch(NAME_PATTERN, key) and key == key.lower()
        )

    def voices(self) -> list[Voice]:
        """All voices that can be used, by name. The log has the reason for the others."""
        voices = []
        for key in self.names():
            with contextlib.suppress(VoiceError):
                voices.append(self.get(key))
        return voices

    def get(self, name: str) -> Voice:
        """A voice.

        Raises:
            UnknownVoiceError: there is none of this name.
            VoiceError: its file cannot be used, or it was made for a model of other sizes.
        """
        try:
            key = voice_key(name)
        except VoiceError:
            raise UnknownVoiceError(f"there is no voice {name[:100]!a}") from None
        entry = self._read(key)
        if entry is None:
            raise UnknownVoiceError(f"there is no voice {name!r}")
        if isinstance(entry.voice, VoiceError):
            raise entry.voice
        return entry.voice

    def check_new(self, name: str, replace: bool = False) -> None:
        """Refuse a voice that `add` would refuse for its name or number, before it is made.

        Raises:
            VoiceError: see `add`.
        """
        key, keys = voice_key(name), self.names()
        if key in keys and not replace:
            raise VoiceExistsError(
                f"there is a voice {name!r} already: delete it, or ask to replace it"
            )
        if key not in keys and len(keys) >= self.max_voices:
            raise StoreFullError(
                f"there are {len(keys)} voices, as many as may be: delete one first"
            )

    def add(self, voice: Voice, replace: bool = False) -> None:
        """Keep a voice. Speech in the voice that it replaces goes on.

        Args:
            voice: the voice.
            replace: it may replace one of the same name.

        Raises:
            VoiceExistsError: there is one of this name, and `replace` is false.
            StoreFullError: there are too many voices, or too many bytes of them.
            VoiceError: the name or the codes are invalid.
            OSError: its file cannot be written.
        """
        key = voice_key(voice.name)
        self._check(voice)
        data = voice_to_bytes(voice)
        with self._changing():
            self.check_new(voice.name, replace)
            others = sum(self._num_bytes(other) for other in self.names() if other != key)
            if len(data) > MAX_FILE_BYTES or others + len(data) > MAX_TOTAL_BYTES:
                raise StoreFullError(
                    f"voice {voice.name!r} takes {len(data)} bytes and the others {others}; "
                    f"{MAX_FILE_BYTES} and {MAX_TOTAL_BYTES} together may be used"
                )
            if self.folder is None:
                self._entries[key] = _Entry((), voice, len(data))
                return
            path = self._path(key)
            with replaced(path) as file:
                file.write(data)
            self._entries[key] = _Entry(_signature(os.fstat(file.fileno())), voice, len(data))
            file.close()

    def remove(self, name: str) -> None:
        """Forget a voice. Speech in it goes on.

        Raises:
            UnknownVoiceError: there is none of this name.
            OSError: its file cannot be removed.
        """
        with self._changing():
            try:
                key = voice_key(name)
                if self.folder is None:
                    del self._entries[key]
                else:
                    self._path(key).unlink()
            except (VoiceError, KeyError, FileNotFoundError):
                raise UnknownVoiceError(f"there is no voice {name[:100]!a}") from None
            self._entries.pop(key, None)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}{_SUFFIX}"

    def _num_bytes(self, key: str) -> int:
        entry = self._read(key)
        return 0 if entry is None else entry.num_bytes

    def _read(self, key: str) -> _Entry | None:
        """The entry of a voice, read again if its file has changed."""
        with self._lock:
            if self.folder is None:
                return self._entries.get(key)
            path = self._path(key)
            try:
                status = os.stat(path)
            except OSError:
                self._entries.pop(key, None)
                return None
            entry = self._entries.get(key)
            if entry is None or entry.signature != _signature(status):
                entry = _Entry(_signature(status), self._load(key, path), status.st_size)
                self._entries[key] = entry
            return entry

    def _load(self, key: str, path: Path) -> Voice | VoiceError:
        try:
            voice = voice_from_bytes(read_bounded(path, MAX_FILE_BYTES))
            if voice.name.lower() != key:
                voice = replace(voice, name=key)  # the file was renamed
            self._check(voice)
        except (OSError, ValueError) as error:
            logger.warning("voice %s cannot be used: %s: %s", key, path, error)
            # Without the path, since clients may see it.
            return VoiceError(f"voice {key!r} cannot be used: {getattr(error, 'strerror', error)}")
        return voice

    def _check(self, voice: Voice) -> None:
        if self.sizes is not None and voice.sizes != self.sizes:
            theirs, ours = voice.sizes, self.sizes
            raise VoiceError(
                f"it was made for a model with {theirs.num_codebooks} codebooks of "
                f"{theirs.audio_vocab_size} codes, and this one has {ours.num_codebooks} of "
                f"{ours.audio_vocab_size}"
            )

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Let no other thread or process change the store."""
        with self._lock:
            if self.folder is None:
                yield
                return
            with open(self.folder / ".lock", "a") as file:
                with contextlib.suppress(OSError):  # the file system has no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield

    def _remove_leftovers(self) -> None:
        """Remove what processes that were killed left of the files that they wrote."""
        assert self.folder is not None
        for temporary in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError), open(temporary, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def shown_names(keys: Sequence[str]) -> str:
    """Names of voices for a message: all, or the first ones."""
    names = [*BUILT_IN, *keys]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
