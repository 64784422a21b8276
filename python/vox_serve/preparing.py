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
MAX_NICENESS = 19


class Preparing:
    """Starts calls at once, `MAX_THREADS` at most; further ones wait for a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_threads = 0
        self._backlog: deque[Callable[[], None]] = deque()

    @property
    def is_busy(self) -> bool:
        """True while a call runs."""
        return self._num_threads > 0

    def start(self, call: Callable[[], None], niceness: int) -> None:
        """Run a call, which must not raise, in a thread.

        Args:
            call: the work.
            niceness: 0 for the process's priority; at 10 a thread gets a tenth of the time of one
                at 0, at 19 next to none while others need it.

        Raises:
            RuntimeError: the system gives no more threads.
        """
        with self._lock:
            if self._num_threads == MAX_THREADS:
                self._backlog.append(call)
                return
            thread = threading.Thread(
                target=self._run, args=(call, niceness), name="preparing", daemon=True
            )
            thread.start()
            self._num_threads += 1

    def _run(self, first: Callable[[], None], niceness: int) -> None:
        if niceness:
            _lower_priority(niceness)
        call: Callable[[], None] | None = first
        while call is not None:
            call()
            with self._lock:
                call = self._backlog.popleft() if self._backlog else None
                self._num_threads -= call is None


def _lower_priority(niceness: int) -> None:
    """Lower the priority of the calling thread, where the system has priorities of threads."""
    if sys.platform != "linux":
        return
    total = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + niceness, MAX_NICENESS)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), total)
