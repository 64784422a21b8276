"""Runs calls beside each other in threads, for work that nothing can interrupt.

Quick calls have a thread each. Of a client's slow calls one runs at a time, so that no client takes
all processors from the engine or delays another client's calls. Where a thread can have a priority
of its own (Linux), theirs is the lowest: the engine's threads wait for each other many times in a
step, so one that has to share its processor makes a step ten times as long. A thread of low
priority that holds Python's lock delays the engine little: while that waits, a processor is free.
The threads are daemons: the end of the process waits for none of them.
"""

import contextlib
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable

MAX_QUICK_THREADS = 64
MAX_SLOW_THREADS = 8
MAX_SLOW_THREADS_PER_CLIENT = 1
MAX_ENCODING_THREADS = 1
LOWEST_PRIORITY = 19


class Preparing:
    """Lanes, so that slow calls never keep quick ones from their threads."""

    def __init__(self) -> None:
        self._quick = _Lane(MAX_QUICK_THREADS, MAX_QUICK_THREADS)
        self._slow = _Lane(MAX_SLOW_THREADS, MAX_SLOW_THREADS_PER_CLIENT, yields=True)
        self._encoding = _Lane(MAX_ENCODING_THREADS, MAX_ENCODING_THREADS)

    @property
    def is_busy(self) -> bool:
        """True while a call runs."""
        lanes = self._quick, self._slow, self._encoding
        return any(lane.num_threads for lane in lanes)

    def start(self, call: Callable[[], None], client: str, slow: bool) -> None:
        """Run a call, which must not raise, in a thread.

        Args:
            call: the work. It may have to wait, if many others run: it should return at once when
                nobody wants its result any more.
            client: whose call it is; waiting clients take turns.
            slow: it may take more than a few milliseconds.

        Raises:
            RuntimeError: the system gives no more threads.
        """
        (self._slow if slow else self._quick).start(call, client)

    def start_encoding(self, call: Callable[[], None], client: str) -> None:
        """Like `start`, for calls that take seconds: one runs at a time, of whichever client."""
        self._encoding.start(call, client)


class _Lane:
    """Starts calls at once while there is room; further ones wait.

    Args:
        max_threads: most calls at once.
        max_per_client: most of them for one client.
        yields: its threads run when others leave a processor.
    """

    def __init__(self, max_threads: int, max_per_client: int, yields: bool = False) -> None:
        self.max_threads = max_threads
        self.max_per_client = max_per_client
        self.yields = yields
        self.num_threads = 0
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._backlog: dict[str, deque[Callable[[], None]]] = {}  # clients, the next one first

    def start(self, call: Callable[[], None], client: str) -> None:
        with self._lock:
            self._backlog.setdefault(client, deque()).append(call)
            if self.num_threads < self.max_threads and self._may_run(client):
                thread = threading.Thread(target=self._run, name="preparing", daemon=True)
                self.num_threads += 1
                try:
                    thread.start()
                except RuntimeError:
                    self.num_threads -= 1
                    self._backlog[client].remove(call)
                    if not self._backlog[client]:
                        del self._backlog[client]
                    raise

    def _run(self) -> None:
        if self.yields and sys.platform == "linux":  # elsewhere it would be the whole process's
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        while True:
            with self._lock:
                client = next(filter(self._may_run, self._backlog), None)
                if client is None:
                    self.num_threads -= 1
                    return
                calls = self._backlog.pop(client)
                call = calls.popleft()
                if calls:
                    self._backlog[client] = calls  # after all others
                self._running[client] += 1
            call()
            with self._lock:
                self._running[client] -= 1
                if not self._running[client]:
                    del self._running[client]

    def _may_run(self, client: str) -> bool:
        return self._running[client] < self.max_per_client
