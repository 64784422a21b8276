"""The rate of a client's errors, or of the answers that it gives up."""

import pytest

from fake_engine import ENDLESS, FakeEngine
from live_server import LiveServer, wait_until
from vox_serve import runner
from vox_serve.client_pace import MAX_CLIENTS, MAX_DELAY_S, ClientPace

BURST = 100
OTHER = "127.0.0.2"


def test_a_client_waits_beyond_its_burst():
    pace = ClientPace(50, BURST)
    assert [pace.count("a", 7.0) for _ in range(BURST)] == [0.0] * BURST
    assert [pace.count("a", 7.0) for _ in range(3)] == pytest.approx([0.02, 0.04, 0.06])
    assert pace.count("b", 7.0) == 0
    assert pace.count("a", 7.05) == pytest.approx(0.03)
    assert pace.count("a", 9.1) == 0


def test_no_client_waits_longer_than_the_limit():
    pace = ClientPace(0.001, BURST)
    assert [pace.count("a", 0.0) for _ in range(BURST + 50)][BURST:] == [MAX_DELAY_S] * 50


def test_a_rate_of_zero_is_no_limit():
    pace = ClientPace(0, BURST)
    assert not any(pace.count("a", 0.0) for _ in range(9 * BURST))
    assert len(pace) == 0


def test_the_memory_is_bounded():
    pace = ClientPace(50, BURST)
    for i in range(3 * MAX_CLIENTS):
        pace.count(f"{i}", 1.0)
    assert len(pace) == MAX_CLIENTS
    for i in range(3 * MAX_CLIENTS):  # all is forgiven: one goes as one comes
        pace.count(f"late {i}", 1e6 + i)
    assert len(pace) <= MAX_CLIENTS


def test_asking_counts_nothing():
    pace = ClientPace(50, 2)
    assert [pace.delay_s("a", 7.0) for _ in range(9)] == [0.0] * 9
    assert [pace.count("a", 7.0) for _ in range(3)] == pytest.approx([0, 0, 0.02])
    assert [pace.delay_s("a", 7.0) for _ in range(9)] == pytest.approx([0.02] * 9)
    assert pace.delay_s("a", 7.02) == pytest.approx(0)


def test_a_client_that_gives_up_many_answers_waits_and_others_do_not(monkeypatch):
    monkeypatch.setattr(runner, "CANCEL_BURST", 2)
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.001)
    with LiveServer(engine, max_cancels_per_s=0.2) as server:
        for index in range(4):
            wait_until(lambda: server.runner.count_jobs() == (0, 0))
            raw = server.post_raw(text=f"{index}", streaming=True, max_frames=2000)
            wait_until(lambda: server.runner.count_jobs() != (0, 0))
            if index < 3:
                assert raw.recv(8)
                raw.close()
        assert server.runner.count_jobs() == (0, 1)
        with server.post_raw(own=OTHER, text="other", streaming=True) as other:
            assert other.recv(8)
        assert server.runner.count_jobs()[1] == 1
        raw.close()
