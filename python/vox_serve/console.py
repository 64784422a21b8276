"""Standard streams that are closed, full or unread, for the commands of vox_serve.

`voxkern.console` does part of this for the other commands; importing it loads torch, which takes
seconds that `--help` does not have.
"""

import contextlib
import os
import select
import sys
from collections.abc import Iterator

CLOSED_PIPE_STATUS = 141  # what a shell reports for a process that SIGPIPE killed


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """End without a traceback where a standard stream is closed or cannot be written.

    If the reader of stdout closes it first, as in `command | head`, the command exits silently. If
    stdout cannot take what was printed (a full disk), it exits with one line and code 1. A
    descriptor 0, 1 or 2 that is closed from the start becomes /dev/null, so that no file of the
    program gets its number; `sys.stdout` or `sys.stdin` is then None.

    A decorator of `main`, or a `with` block around it.
    """
    _open_missing_streams()
    try:
        try:
            yield
        finally:
            _flush_stdout()
    except BrokenPipeError:
        if not stdout_is_broken():
            raise  # another pipe or socket
        discard_stdout()
        sys.exit(CLOSED_PIPE_STATUS)


def stdout_is_broken() -> bool:
    """True if stdout is a pipe or a socket whose reader is gone."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def discard_stdout() -> None:
    """Drop what was printed and could not be written: Python would try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_missing_streams() -> None:
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    if sys.stderr is None:  # print() would take stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _flush_stdout() -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        sys.exit(f"cannot write stdout: {error.strerror}")
