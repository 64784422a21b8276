"""Runs calls beside each other in threads, for work that nothing can interrupt.

Each call has its own thread, so none waits for another. The threads are daemons: the end of the
process waits for none of them.
"""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable

MAX_THREADS = 256
NICENESS = 10
"""A thread at this distance gets a tenth of the time of one at normal priority."""


class Preparing:
    """Starts calls at once, `MAX_THREADS` at most; further ones wait in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_threads = 0
        self._backlog: deque[Callable[[], None]] = deque()

    @property
    def is_busy(self) -> bool:
        """True while a call runs."""
        return self._num_threads > 0

    def start(self, call: Callable[[], None], in_background: bool) -> None:
        """Run a call, which must not raise, in a thread.

        Args:
            call: the work.
            in_background: it may take long: give it the time that others leave.

        Raises:
            RuntimeError: the system gives no more threads.
        """
        with self._lock:
            if self._num_threads == MAX_THREADS:
                self._backlog.append(call)
                return
            thread = threading.Thread(
                target=self._run, args=(call, in_background), name="preparing", daemon=True
            )
            thread.start()
            self._num_threads += 1

    def _run(self, first: Callable[[], None], in_background: bool) -> None:
        if in_background:
            _lower_priority()
        call: Callable[[], None] | None = first
        while call is not None:
            call()
            with self._lock:
                call = self._backlog.popleft() if self._backlog else None
                self._num_threads -= call is None


def _lower_priority() -> None:
    """Lower the priority of the calling thread, where the system has priorities of threads."""
    if sys.platform != "linux":
        return
    niceness = os.getpriority(os.PRIO_PROCESS, 0) + NICENESS
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(niceness, 19))
