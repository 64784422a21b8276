"""Threads that prepare requests: slow calls never stand in the way of quick ones."""

import os
import sys
import threading
from functools import partial

import pytest

from fake_engine import TIMEOUT_S
from live_server import wait_until
from vox_serve.preparing import LOWEST_PRIORITY, MAX_SLOW_THREADS, Preparing


def test_slow_calls_delay_no_quick_one():
    preparing, release, quick = Preparing(), threading.Event(), threading.Event()
    for _ in range(100):
        preparing.start(partial(release.wait, TIMEOUT_S), "a", slow=True)
    preparing.start(quick.set, "b", slow=False)
    assert quick.wait(TIMEOUT_S)
    assert preparing.is_busy
    release.set()
    wait_until(lambda: not preparing.is_busy)


def test_a_client_has_one_slow_call_at_a_time_and_delays_no_other_client():
    preparing, release, other = Preparing(), threading.Event(), threading.Event()
    done: list[str] = []
    preparing.start(partial(release.wait, TIMEOUT_S), "a", slow=True)
    for call in ("a1", "a2", "a3"):
        preparing.start(partial(done.append, call), "a", slow=True)
    preparing.start(other.set, "b", slow=True)
    assert other.wait(TIMEOUT_S)
    assert not done
    release.set()
    wait_until(lambda: not preparing.is_busy)
    assert done == ["a1", "a2", "a3"]


def test_clients_that_wait_for_a_thread_take_turns():
    preparing, release = Preparing(), threading.Event()
    done: list[str] = []
    for number in range(MAX_SLOW_THREADS):
        preparing.start(partial(release.wait, TIMEOUT_S), f"x{number}", slow=True)
    for call in ("a1", "a2", "b1", "c1", "b2"):
        preparing.start(partial(done.append, call), call[0], slow=True)
    assert not done
    release.set()
    wait_until(lambda: not preparing.is_busy)
    assert sorted(done) == ["a1", "a2", "b1", "b2", "c1"]
    assert done.index("a1") < done.index("a2")
    assert done.index("b1") < done.index("b2")


def test_a_thread_that_cannot_start_stops_no_later_call(monkeypatch):
    def fail(_):
        raise RuntimeError("can't start new thread")

    preparing, done = Preparing(), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            preparing.start(list, "a", slow=True)
    preparing.start(done.set, "b", slow=True)
    assert done.wait(TIMEOUT_S)
    wait_until(lambda: not preparing.is_busy)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_slow_calls_run_at_the_lowest_priority():
    preparing, seen = Preparing(), {}

    def look(name: str) -> None:
        seen[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    for name in ("quick", "slow"):
        preparing.start(partial(look, name), "a", slow=name == "slow")
    wait_until(lambda: not preparing.is_busy)
    assert seen == {"quick": os.getpriority(os.PRIO_PROCESS, 0), "slow": LOWEST_PRIORITY}
