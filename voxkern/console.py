"""For every command of the project that prints."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator

CLOSED_PIPE_STATUS = 141  # what a shell reports for a process that SIGPIPE killed


@contextlib.contextmanager
def quiet_on_closed_pipe() -> Iterator[None]:
    """Exit without a traceback if the reader of stdout closes it first, as in `command | head`.

    A stdout that is closed from the start is one line and code 1.

    A decorator of `main`, or a `with` block around it.
    """
    if sys.stdout is None:
        sys.exit("stdout is closed")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise  # another pipe or socket
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE_STATUS)


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
