"""A cache of tensors derived from a checkpoint, in a file that later starts map into memory.

A cache is two files. `NAME.safetensors` holds the tensors. `NAME.json` records, for each source
file and for the tensor file itself, its size, a digest of its content, and a stamp: mtime, ctime
and inode. If a file's stamp is unchanged, so is its content: the kernel updates the ctime at every
change, even when a program resets the mtime. If the stamp differs (the file was copied, touched or
downloaded again), the file is read and its digest decides.

Both files are written under a temporary name, then renamed. So a reader finds a complete file or
none, and a mapping stays valid when its file is replaced. Two processes that write at the same time
do no harm: they write equal contents, and a mismatch would fail the digests. A temporary file is
locked while it is written, and the lock ends with its process, so that the next writer can remove
files that killed processes left.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vox_serve.atomic_file import replaced
from vox_serve.json_file import read_json_file

_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ALIGNMENT = 64
_DIGEST_CHUNK_BYTES = 8 << 20
_SETTLED_S = 2.0
"""A later change is certain to alter a file's times if the last one was at least this long ago."""
_OUR_SETTLED_S = 0.05  # the same for a file that only this process writes to

logger = logging.getLogger("vox_serve")


class _Content(NamedTuple):
    """Identifies a file's content, and lets it be recognised without reading the file.

    Attributes:
        size: in bytes.
        digest: digest of the content.
        stamp: see `_stamp`; None if a later change might not alter it.
    """

    size: int
    digest: str
    stamp: list[int] | None


class WeightCache:
    """The cache of one packing of one checkpoint.

    Args:
        folders: candidate folders; the first that can be written to is used.
        name: name of the packing; the files' name without a suffix.
        version: version of the code that derives the tensors; caches of other versions are not
            used.
        sources: the files that the tensors are derived from, in a fixed order. They may be moved
            together.
        stamps: of the sources, from `folder_stamps` before they were read. A source that differs
            from its stamp, or has none, was changed meanwhile: then there is no cache.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        name: str,
        version: Sequence[int | str],
        sources: Sequence[Path],
        stamps: Mapping[Path, list[int]],
    ) -> None:
        self._folders = list(folders)
        self._name = name
        self._version = list(version)
        self._sources = {os.path.relpath(path, sources[0].parent): path for path in sources}
        self._stamps = {name: stamps.get(path) for name, path in self._sources.items()}

    def load(self) -> dict[str, Tensor] | None:
        """The tensors by name, mapped from their file; None if no cache fits the sources."""
        for folder in self._folders:
            if (tensors := self._load(folder)) is not None:
                return tensors
        return None

    def save(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Write the tensors, and map the written file.

        If they cannot be written, there is no cache and one line is logged.

        Args:
            tensors: by name, on the CPU.

        Returns:
            The mapped tensors, as in `load`; None if they could not be written.
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
                current_data = _verified(known_data, file)
                if current_data is None:
                    return None
                current: dict[str, _Content] = {}
                for name, path in self._sources.items():
                    with open(path, "rb") as source:
                        content = _verified(known[name], source)
                        if content is None or self._is_changed(name, source):
                            return None
                    current[name] = content
                tensors = _map(file)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError):
            return None
        if (current, current_data) != (known, known_data):
            with contextlib.suppress(OSError):
                self._write_record(record, current, current_data)
        return tensors

    def _save(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        folder.mkdir(parents=True, exist_ok=True)
        sources = {}
        for name, path in self._sources.items():
            with open(path, "rb") as source:
                sources[name] = _content(source, _SETTLED_S)
                if self._is_changed(name, source):
                    raise OSError(f"{path} was changed while it was read")
        self._remove_stale(folder, sources)
        data, record = self._files(folder)
        with replaced(data) as file:
            _write(file, tensors)
        with file:
            try:
                self._write_record(record, sources, _content(file, _OUR_SETTLED_S))
            except OSError:
                data.unlink(missing_ok=True)
                raise
            return _map(file)

    def _is_changed(self, name: str, source: IO[bytes]) -> bool:
        """True if a source may not be the file that was read."""
        return _stamp(os.fstat(source.fileno())) != self._stamps[name]

    def _write_record(self, record: Path, sources: dict[str, _Content], data: _Content) -> None:
        value = {"version": self._version, "sources": sources, "tensors": data}
        text = json.dumps(value, indent=1).encode()
        with replaced(record) as file:
            file.write(text)
        file.close()

    def _remove_stale(self, folder: Path, sources: Mapping[str, _Content]) -> None:
        """Remove files that no process can use any more: caches of other versions or of the
        sources' earlier contents, and temporary files of killed processes."""
        current = {name: content.digest for name, content in sources.items()}
        for record in folder.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                version, known, _ = _read_record(record)
                recorded = {name: content.digest for name, content in known.items()}
                if version != self._version or recorded != current:
                    record.with_suffix(".safetensors").unlink(missing_ok=True)
                    record.unlink()
        for temporary in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError), open(temporary, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()


def folder_stamps(folder: Path) -> dict[Path, list[int]]:
    """Stamps of the files in a folder, for `WeightCache`."""
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return {path: _stamp(os.stat(path)) for path in files}


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _content(file: IO[bytes], settled_s: float) -> _Content:
    """Read a file's content; its stamp only if the last change is at least `settled_s` ago."""
    status = os.fstat(file.fileno())
    digest = _digest(file.fileno(), status.st_size)
    age_s = time.time() - status.st_ctime_ns / 1e9
    return _Content(status.st_size, digest, _stamp(status) if age_s >= settled_s else None)


def _verified(known: _Content, file: IO[bytes]) -> _Content | None:
    """`known`, with a new stamp if that differs; None if the file has another content."""
    status = os.fstat(file.fileno())
    if status.st_size != known.size:
        return None
    if known.stamp == _stamp(status):
        return known
    content = _content(file, _SETTLED_S)
    return content if content.digest == known.digest else None


def _digest(fd: int, size: int) -> str:
    """SHA-256 of the SHA-256 digests of every 8 MiB, which the cores compute in parallel."""

    def part(start: int) -> bytes:
        return hashlib.sha256(os.pread(fd, _DIGEST_CHUNK_BYTES, start)).digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        parts = threads.map(part, range(0, size, _DIGEST_CHUNK_BYTES))
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _read_record(path: Path) -> tuple[list[int | str], dict[str, _Content], _Content]:
    value = read_json_file(path)
    sources = {name: _Content(*content) for name, content in value["sources"].items()}
    return value["version"], sources, _Content(*value["tensors"])


def _write(file: IO[bytes], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in safetensors format, aligned to 64 bytes as far as their sizes allow.

    safetensors' own writer copies all tensors first.
    """
    # The format has no gaps: sizes that break the alignment go last, wide elements first.
    order = sorted(
        tensors,
        key=lambda name: (tensors[name].nbytes % _ALIGNMENT > 0, -tensors[name].element_size()),
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if shutil.disk_usage(os.path.dirname(file.name)).free < end:  # before the disk fills up
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in order:
        file.write(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)


def _map(file: IO[bytes]) -> dict[str, Tensor]:
    """Map the tensors of an open safetensors file: pages of the kernel's cache, which all processes
    share.

    The file is opened by its descriptor: by now, another one may have replaced it at its path.
    """
    fd = file.fileno()
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
    with safe_open(f"/dev/fd/{fd}", framework="pt") as mapped:
        return {name: mapped.get_tensor(name) for name in mapped.keys()}  # noqa: SIM118 (no dict)
