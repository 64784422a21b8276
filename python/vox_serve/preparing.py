"""Runs calls beside each other in threads, for work that nothing can interrupt.

Each call has its own thread, so none waits for another; the lower its priority, the less it takes
from the engine. The threads are daemons: the end of the process waits for none of them.
"""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable

MAX_NICENESS = 19
NUM_UNHINDERED = 4
"""Quick calls that run at the process's priority; further ones take the time that is left."""


class Preparing:
    """Two lanes, so that slow calls never keep quick ones from their threads."""

    def __init__(self) -> None:
        self._quick = _Lane(64)
        self._slow = _Lane(16)

    @property
    def is_busy(self) -> bool:
        """True while a call runs."""
        return self._quick.num_threads + self._slow.num_threads > 0

    def start(self, call: Callable[[], None], niceness: int) -> None:
        """Run a call, which must not raise, in a thread.

        Args:
            call: the work. It may have to wait, if many others run: it should return at once when
                nobody wants its result any more.
            niceness: 0 for a quick call; at 10 a thread gets a tenth of the time of one at 0, at
                19 next to none while others need it.

        Raises:
            RuntimeError: the system gives no more threads.
        """
        lane = self._slow if niceness else self._quick
        if lane.num_threads >= NUM_UNHINDERED and not niceness:
            niceness = MAX_NICENESS
        lane.start(call, niceness)


class _Lane:
    """Starts calls at once while there are fewer than `max_threads`; further ones wait."""

    def __init__(self, max_threads: int) -> None:
        self.max_threads = max_threads
        self.num_threads = 0
        self._lock = threading.Lock()
        self._backlog: deque[Callable[[], None]] = deque()

    def start(self, call: Callable[[], None], niceness: int) -> None:
        with self._lock:
            if self.num_threads == self.max_threads:
                self._backlog.append(call)
                return
            thread = threading.Thread(
                target=self._run, args=(call, niceness), name="preparing", daemon=True
            )
            thread.start()
            self.num_threads += 1

    def _run(self, first: Callable[[], None], niceness: int) -> None:
        if niceness:
            _lower_priority(niceness)
        call: Callable[[], None] | None = first
        while call is not None:
            call()
            with self._lock:
                call = self._backlog.popleft() if self._backlog else None
                self.num_threads -= call is None


def _lower_priority(niceness: int) -> None:
    """Lower the priority of the calling thread, where the system has priorities of threads."""
    if sys.platform != "linux":
        return
    total = min(os.getpriority(os.PRIO_PROCESS, os.getpid()) + niceness, MAX_NICENESS)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), total)
