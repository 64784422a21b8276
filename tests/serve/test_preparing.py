"""Threads that prepare requests: slow calls never stand in the way of quick ones."""

import threading
from functools import partial

from fake_engine import TIMEOUT_S
from live_server import wait_until
from vox_serve.preparing import MAX_SLOW_THREADS, Preparing


def test_slow_calls_delay_no_quick_one():
    preparing, release, quick = Preparing(), threading.Event(), threading.Event()
    for _ in range(100):
        preparing.start(partial(release.wait, TIMEOUT_S), "a", slow=True)
    preparing.start(quick.set, "b", slow=False)
    assert quick.wait(TIMEOUT_S)
    assert preparing.is_busy
    release.set()
    wait_until(lambda: not preparing.is_busy)


def test_clients_with_slow_calls_take_turns():
    preparing, release = Preparing(), threading.Event()
    done: list[str] = []
    for _ in range(MAX_SLOW_THREADS - 1):  # one thread is left, which runs calls in order
        preparing.start(partial(release.wait, TIMEOUT_S), "x", slow=True)
    gate = threading.Event()
    preparing.start(partial(gate.wait, TIMEOUT_S), "x", slow=True)
    for call in ("a1", "a2", "a3", "b1", "c1", "b2"):
        preparing.start(partial(done.append, call), call[0], slow=True)
    gate.set()
    wait_until(lambda: len(done) == 6)
    assert done == ["a1", "b1", "c1", "a2", "b2", "a3"]
    release.set()
    wait_until(lambda: not preparing.is_busy)
