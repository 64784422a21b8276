"""Voices that were added, in a folder or in memory."""

import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

from vox_serve.atomic_file import replaced
from vox_serve.config import DEFAULT_MAX_SPEAKER
from vox_serve.json_file import read_bounded
from vox_serve.prompt import Segment
from vox_serve.voice_file import (
    MAX_FILE_BYTES,
    NAME_PATTERN,
    Sizes,
    Voice,
    VoiceError,
    voice_from_bytes,
    voice_key,
    voice_to_bytes,
)

logger = logging.getLogger("vox_serve")

MAX_LISTED_SPEAKERS = 16


def is_speaker(name: str, max_speaker: int = DEFAULT_MAX_SPEAKER) -> bool:
    """True if a voice's name is the number of one of the model's own speakers, which no store
    holds."""
    is_number = name.isascii() and name.isdigit() and name == name.lstrip("0").rjust(1, "0")
    return is_number and len(name) < 11 and int(name) <= max_speaker


def speaker_names(max_speaker: int = DEFAULT_MAX_SPEAKER) -> list[str]:
    """Names of the model's own speakers, or of the first ones."""
    return [str(i) for i in range(min(max_speaker + 1, MAX_LISTED_SPEAKERS))]


MAX_TOTAL_BYTES = 2**28
_SUFFIX = ".safetensors"

LOCK_TIMEOUT_S = 5.0
"""Time that a change waits for the changes of other threads and processes."""
_LOCK_POLL_S = 0.02


class UnknownVoiceError(VoiceError):
    """There is no such voice."""


class VoiceExistsError(VoiceError):
    """There is such a voice already."""


class StoreFullError(VoiceError):
    """The store holds as many voices, or bytes, as it may."""


class StoreBusyError(VoiceError):
    """Another thread or process changes the store, and takes too long."""

    def __init__(self) -> None:
        super().__init__("the folder of voices is locked by another process: try later")


class _Entry(NamedTuple):
    """A voice, or why there is none, and the file's status when it was read."""

    signature: tuple[int, ...]
    voice: Voice | VoiceError
    num_bytes: int


class VoiceStore:
    """Voices by name, in a folder or in memory. Any thread may use it.

    Other processes may use the same folder: files are written whole, changes take a lock, and
    reading follows the files as they are, without waiting for changes.

    Args:
        folder: holds `NAME.safetensors` for each voice, and is made if it is missing; None for
            voices that end with the process.
        sizes: of the model; None to accept voices of all models.
        max_speaker: the model's highest speaker.
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
        self._lock = threading.Lock()  # guards the entries
        self._change_lock = threading.Lock()  # held through a change
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
            StoreBusyError: another change takes too long.
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
            signature: tuple[int, ...] = ()
            if self.folder is not None:
                with replaced(self._path(key)) as file:
                    file.write(data)
                signature = _signature(os.fstat(file.fileno()))
                file.close()
            with self._lock:
                self._entries[key] = _Entry(signature, voice, len(data))

    def remove(self, name: str) -> None:
        """Forget a voice. Speech in it goes on.

        Raises:
            UnknownVoiceError: there is none of this name.
            StoreBusyError: another change takes too long.
            OSError: its file cannot be removed.
        """
        with self._changing():
            try:
                key = voice_key(name)
                if self.folder is not None:
                    self._path(key).unlink()
            except (VoiceError, FileNotFoundError):
                raise UnknownVoiceError(f"there is no voice {name[:100]!a}") from None
            with self._lock:
                entry = self._entries.pop(key, None)
            if self.folder is None and entry is None:
                raise UnknownVoiceError(f"there is no voice {name!r}")

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
        """Let no other thread or process change the store.

        Raises:
            StoreBusyError: others changed it for `LOCK_TIMEOUT_S`.
        """
        until_s = time.monotonic() + LOCK_TIMEOUT_S
        if not self._change_lock.acquire(timeout=LOCK_TIMEOUT_S):
            raise StoreBusyError
        try:
            if self.folder is None:
                yield
                return
            with open(self.folder / ".lock", "a") as file:
                _lock_file(file, until_s)
                yield
        finally:
            self._change_lock.release()

    def _remove_leftovers(self) -> None:
        """Remove what processes that were killed left of the files that they wrote."""
        assert self.folder is not None
        for temporary in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError), open(temporary, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()


def _lock_file(file: IO[str], until_s: float) -> None:
    """Lock a file that other processes lock too.

    Raises:
        StoreBusyError: one of them still holds it at `until_s`, by the monotonic clock.
    """
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until_s:
                raise StoreBusyError from None
            time.sleep(_LOCK_POLL_S)
        except OSError:  # the file system has no locks
            return
        else:
            return


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def find_voice(
    name: str,
    folder: Path | str | None,
    sizes: Sizes | None = None,
    max_speaker: int = DEFAULT_MAX_SPEAKER,
) -> tuple[int, Sequence[Segment]]:
    """The speaker and the segments of a voice.

    Args:
        name: of a voice in the folder; or a speaker's number, which has no segments.
        folder: that keeps the voices; None if there is none.
        sizes: of the model; None to accept voices of all models.
        max_speaker: the model's highest speaker.

    Raises:
        VoiceError: there is no such voice, or it cannot be used.
    """
    if is_speaker(name, max_speaker):
        return int(name), ()
    if folder is None or not Path(folder).is_dir():
        where = "there is no folder of voices" if folder is None else f"there is no folder {folder}"
        raise UnknownVoiceError(f"there is no voice {name[:100]!a}: {where} (see --voices)")
    store = VoiceStore(folder, sizes)
    try:
        voice = store.get(name)
    except UnknownVoiceError as error:
        names = shown_names(store.names(), max_speaker)
        raise UnknownVoiceError(f"{error}; there are {names}") from None
    return voice.speaker, voice.segments


def shown_names(keys: Sequence[str], max_speaker: int = DEFAULT_MAX_SPEAKER) -> str:
    """Names of voices for a message: all, or the first ones."""
    names = [*speaker_names(max_speaker), *keys]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
