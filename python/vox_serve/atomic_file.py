"""Writes files whole: a reader, or a failure at any point, finds the old content or the new one."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_MAX_NAME_CHARS = 32  # of a file's name in that of its temporary, which must stay below 255 bytes
_NO_ENTRY_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV)  # the file is a mount point


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A file to write; its content replaces that of `path` when the block ends without an error.

    The content is written beside `path`, to disk, then renamed. Mode and owner of an existing file
    are kept, the latter as far as the process may set them; a symbolic link stays, and the file
    that it names is replaced. Two kinds are written in place: what is not a regular file (a
    device, a pipe, anything below /dev and /proc), and an existing file that cannot be replaced
    because its folder is not writable or it is a mount point.

    Raises:
        OSError: it cannot be written; the message names `path`, whose content is the old one.
    """
    try:
        with _open(Path(path)) as file:
            yield file
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Like `atomic_write` for a file of our own: no links, no devices, no metadata to keep.

    The file stays open, and is the caller's to close, unless there is an error.
    """
    temporary, file = new_beside(path)
    try:
        yield file
        sync(file)
        os.replace(temporary, path)
    except BaseException:
        _discard(temporary, file)
        raise


def sync(file: IO[bytes]) -> None:
    """Write a file's buffer to disk."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # a pipe or a device
            raise


def new_beside(path: Path) -> tuple[Path, IO[bytes]]:
    """A new locked file in the folder of `path`, hidden, named after it and ending in `.tmp`.

    The lock ends with the process: whoever gets it may remove the file. Before it is locked,
    another process may mistake it for the file of a dead one; then the next name is tried.
    """
    while True:
        name = path.name[:_MAX_NAME_CHARS]
        temporary = path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")
        try:
            file = open(temporary, "x+b")  # noqa: SIM115
            with contextlib.suppress(OSError):  # the file system has no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return temporary, file
            file.close()
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    if _is_special(path, status):
        with open(path, "wb") as special:
            yield special
        return
    target = Path(os.path.realpath(path))
    try:
        temporary, file = new_beside(target)
    except OSError as error:
        if status is None or error.errno not in _NO_ENTRY_ALLOWED:
            raise
        with open(target, "wb") as in_place:
            yield in_place
        return
    try:
        yield file
        if status is not None:
            _keep_metadata(file, status)
        sync(file)
        try:
            os.replace(temporary, target)
        except OSError as error:
            if error.errno not in _CANNOT_RENAME:
                raise
            file.seek(0)
            with open(target, "wb") as in_place:
                shutil.copyfileobj(file, in_place)
            temporary.unlink()
    except BaseException:
        _discard(temporary, file)
        raise
    file.close()


def _is_special(path: Path, status: os.stat_result | None) -> bool:
    if status is not None and not stat.S_ISREG(status.st_mode):
        return True
    # /dev/stdout may be a regular file; a rename would not reach the descriptor.
    return os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/"))


def _keep_metadata(file: IO[bytes], old: os.stat_result) -> None:
    new = os.fstat(file.fileno())
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with contextlib.suppress(OSError):  # only root may give files away
            os.fchown(file.fileno(), old.st_uid, old.st_gid)
    os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))


def _discard(temporary: Path, file: IO[bytes]) -> None:
    temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # closing flushes the rest of the buffer
        file.close()
