"""Runs calls beside each other in threads, for work that nothing can interrupt.

Quick calls have a thread each. Slow ones share a few, clients taking turns, so that they never take
all processors from the engine. Lower priorities for threads would not do: one that holds Python's
lock while it does not run would stop all others. The threads are daemons: the end of the process
waits for none of them.
"""

import threading
from collections import deque
from collections.abc import Callable

MAX_QUICK_THREADS = 64
MAX_SLOW_THREADS = 2


class Preparing:
    """Two lanes, so that slow calls never keep quick ones from their threads."""

    def __init__(self) -> None:
        self._quick = _Lane(MAX_QUICK_THREADS)
        self._slow = _Lane(MAX_SLOW_THREADS)

    @property
    def is_busy(self) -> bool:
        """True while a call runs."""
        return self._quick.num_threads + self._slow.num_threads > 0

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


class _Lane:
    """Starts calls at once while there are fewer than `max_threads`; further ones wait."""

    def __init__(self, max_threads: int) -> None:
        self.max_threads = max_threads
        self.num_threads = 0
        self._lock = threading.Lock()
        self._backlog: dict[str, deque[Callable[[], None]]] = {}  # clients, the next one first

    def start(self, call: Callable[[], None], client: str) -> None:
        with self._lock:
            if self.num_threads == self.max_threads:
                self._backlog.setdefault(client, deque()).append(call)
                return
            threading.Thread(target=self._run, args=(call,), name="preparing", daemon=True).start()
            self.num_threads += 1

    def _run(self, first: Callable[[], None]) -> None:
        call: Callable[[], None] | None = first
        while call is not None:
            call()
            with self._lock:
                call = self._next()
                self.num_threads -= call is None

    def _next(self) -> Callable[[], None] | None:
        if not self._backlog:
            return None
        client = next(iter(self._backlog))
        calls = self._backlog.pop(client)
        call = calls.popleft()
        if calls:
            self._backlog[client] = calls  # after all others
        return call
