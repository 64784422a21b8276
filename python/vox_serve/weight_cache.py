"""Tensors made of a checkpoint's files, kept in a file and mapped into memory by later starts.

A cache is two files. `NAME.safetensors` holds the tensors; `NAME.json` says what they were made of:
for each source, and for the tensors' own file, its size, a digest of its content and a stamp, its
mtime, ctime and inode. A file whose stamp is as it was, is as it was: the kernel sets the ctime at
every change, also where a copy or a program sets the mtime back. A file with another stamp (copied,
touched, downloaded again) is read, and its digest decides.

Both files are written under another name, then renamed. So a reader finds a whole file or none,
and a mapping outlives what replaces its file. Two processes that write at once do no harm: what
they write is equal, and if it were not, the digests would not fit. A temporary file is locked while
it is written, and such a lock ends with its process: what a killed one left, the next writer
removes.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_ALIGNMENT = 64
_DIGEST_CHUNK_BYTES = 8 << 20
_SETTLED_S = 2.0
"""A change is sure to show in a file's times if the last one was so long ago."""
_OUR_SETTLED_S = 0.05  # nobody else has written to it

logger = logging.getLogger("vox_serve")


class _Content(NamedTuple):
    """A file's content, and how to tell that it is still the same without reading it.

    Attributes:
        size: in bytes.
        digest: of the content.
        stamp: see `_stamp`; None if a later change may not show in it.
    """

    size: int
    digest: str
    stamp: list[int] | None


class WeightCache:
    """One packing of one checkpoint.

    To be made before the sources are read: what is saved is what they held then.

    Args:
        folders: where it may lie; written to the first that takes it.
        name: of the packing; the files' name without an ending.
        version: of how the tensors are made of the sources; another one's are not used.
        sources: the files that they are made of, in an order that stays. They may be moved
            together.
    """

    def __init__(
        self, folders: Sequence[Path], name: str, version: Sequence[int], sources: Sequence[Path]
    ):
        self._folders = list(folders)
        self._name = name
        self._version = list(version)
        self._sources = {os.path.relpath(path, sources[0].parent): path for path in sources}
        self._stamps = {name: _stamp(os.stat(path)) for name, path in self._sources.items()}

    def load(self) -> dict[str, Tensor] | None:
        """The tensors by name, mapped from their file; None if there are none of these sources."""
        for folder in self._folders:
            if (tensors := self._load(folder)) is not None:
                return tensors
        return None

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Write the tensors, and map what was written.

        What cannot be written is done without, and one line is logged.

        Args:
            tensors: by name, on the CPU.

        Returns:
            As `load`.
        """
        reasons = []
        for folder in self._folders:
            try:
                kept = self._load(folder)
                if kept is not None and _kinds(kept) == _kinds(tensors):
                    return kept
                return self._save(folder, tensors)
            except OSError as error:
                reasons.append(str(error))
        logger.warning("packed weights cannot be kept for later starts: %s", "; ".join(reasons))
        return None

    def _files(self, folder: Path) -> tuple[Path, Path]:
        return folder / f"{self._name}.safetensors", folder / f"{self._name}.json"

    def _load(self, folder: Path) -> dict[str, Tensor] | None:
        data, record = self._files(folder)
        try:
            version, known, known_data = _read_record(record)
            if version != self._version or list(known) != list(self._sources):
                return None
            with open(data, "rb") as file:
                now_data = _verified(known_data, file)
                if now_data is None:
                    return None
                now: dict[str, _Content] = {}
                for name, path in self._sources.items():
                    with open(path, "rb") as source:
                        now_source = _verified(known[name], source)
                    if now_source is None:
                        return None
                    now[name] = now_source
                tensors = _map(file)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        if (now, now_data) != (known, known_data):
            with contextlib.suppress(OSError):
                self._write_record(record, now, now_data)
        return tensors

    def _save(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        folder.mkdir(parents=True, exist_ok=True)
        sources = {}
        for name, path in self._sources.items():
            with open(path, "rb") as source:
                sources[name] = _content(source, _SETTLED_S)
                if _stamp(os.fstat(source.fileno())) != self._stamps[name]:
                    raise OSError(f"{path} was changed while it was read")
        self._remove_stale(folder, sources)
        data, record = self._files(folder)
        with _replace(data, lambda file: _write(file, tensors)) as file:
            try:
                self._write_record(record, sources, _content(file, _OUR_SETTLED_S))
            except OSError:
                data.unlink(missing_ok=True)
                raise
            return _map(file)

    def _write_record(self, record: Path, sources: dict[str, _Content], data: _Content) -> None:
        value = {"version": self._version, "sources": sources, "tensors": data}
        text = json.dumps(value, indent=1).encode()
        _replace(record, lambda file: file.write(text)).close()

    def _remove_stale(self, folder: Path, sources: Mapping[str, _Content]) -> None:
        """Remove what no process can use any more: other packings of what the sources were, and
        what killed processes left."""
        digests = {name: content.digest for name, content in sources.items()}
        for record in folder.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                version, known, _ = _read_record(record)
                current = {name: content.digest for name, content in known.items()} == digests
                if version != self._version or not current:
                    record.with_suffix(".safetensors").unlink(missing_ok=True)
                    record.unlink()
        for temporary in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError), open(temporary, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _content(file: IO[bytes], settled_s: float) -> _Content:
    """What a file holds; its stamp only if the last change is at least `settled_s` ago."""
    status = os.fstat(file.fileno())
    digest = _digest(file.fileno(), status.st_size)
    age_s = time.time() - status.st_ctime_ns / 1e9
    return _Content(status.st_size, digest, _stamp(status) if age_s >= settled_s else None)


def _verified(known: _Content, file: IO[bytes]) -> _Content | None:
    """`known`, with a new stamp if need be; None if the file holds something else."""
    status = os.fstat(file.fileno())
    if status.st_size != known.size:
        return None
    if known.stamp == _stamp(status):
        return known
    content = _content(file, _SETTLED_S)
    return content if content.digest == known.digest else None


def _digest(fd: int, size: int) -> str:
    """SHA-256 of the SHA-256 of every 8 MiB, so that every core can take a part."""

    def part(start: int) -> bytes:
        return hashlib.sha256(os.pread(fd, _DIGEST_CHUNK_BYTES, start)).digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        parts = threads.map(part, range(0, size, _DIGEST_CHUNK_BYTES))
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _read_record(path: Path) -> tuple[list[int], dict[str, _Content], _Content]:
    value = json.loads(path.read_text(encoding="utf-8"))
    sources = {name: _Content(*content) for name, content in value["sources"].items()}
    return value["version"], sources, _Content(*value["tensors"])


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> IO[bytes]:
    """Put what `write` writes in the place of `path` when it is whole and on the disk; opened."""
    file = _temporary(path)
    temporary = Path(file.name)
    try:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it would write what is still in its buffer
            file.close()
        raise
    return file


def _temporary(path: Path) -> IO[bytes]:
    """A new file beside `path`, locked: until it is, another writer may take it for a dead one's,
    and remove it."""
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp"), "x+b")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _write(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, each at a multiple of 64 bytes if all of them can be.

    The format's own writer copies them all first.
    """
    # The format has no gaps: odd sizes go last, wide elements first among them.
    order = sorted(
        tensors,
        key=lambda name: (tensors[name].nbytes % _ALIGNMENT > 0, -tensors[name].element_size()),
    )
    dtype_names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": dtype_names[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if shutil.disk_usage(os.path.dirname(file.name)).free < end:  # before others feel it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in order:
        file.write(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)


def _map(file: IO[bytes]) -> dict[str, Tensor]:
    """The tensors of a file that `_write` wrote: pages of the kernel's cache, shared by all."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.madvise(mmap.MADV_WILLNEED)
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    del header["__metadata__"]
    content = torch.frombuffer(mapped, dtype=torch.uint8)[start:]
    tensors = {}
    for name, about in header.items():
        first, end = about["data_offsets"]
        tensors[name] = content[first:end].view(_DTYPES[about["dtype"]]).view(about["shape"])
    return tensors
