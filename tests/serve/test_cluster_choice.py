"""The choice of a replica, and of their number, without Ray."""

import asyncio
from types import SimpleNamespace
from typing import ClassVar

import pytest

from vox_serve.cluster.choice import ALIKE, SENT_S, Chooser
from vox_serve.cluster.directory import CLAIM_S, GRACE_S, Directory
from vox_serve.cluster.door import Want
from vox_serve.cluster.fleet import ROUTERS, ServeFleet
from vox_serve.cluster.report import Report, key_hash, streams_at_once
from vox_serve.cluster.scaling import wanted
from vox_serve.cluster.summary import merged_metrics
from vox_serve.step_times import StepTimes


def report(capacity=8, busy=0, wait_s=0.0, keys=()) -> Report:
    return Report(capacity, busy, wait_s, 0, tuple(map(key_hash, keys)), "127.0.0.1", 1, "s")


CALL = Want("conversation:call")


def test_a_request_goes_to_the_replica_with_the_most_slack():
    order = Chooser().order(Want(), {"a": report(busy=5), "b": report(busy=1)}, 0.0)
    assert order == ["b", "a"]


def test_load_is_shared_though_one_replica_seems_faster():
    reports = {"a": report(capacity=22), "b": report(capacity=16)}
    chooser, counts = Chooser(), {"a": 0, "b": 0}
    for _ in range(4):
        name = chooser.order(Want(), reports, 0.0)[0]
        chooser.sent(Want(), name, 0.0)
        counts[name] += 1
    assert counts == {"a": 2, "b": 2}


def test_what_was_sent_counts_until_it_is_reported():
    chooser, reports = Chooser(), {"a": report(), "b": report(busy=1)}
    for now_s, best in ((0.0, "a"), (0.1, "a"), (0.2, "b")):
        assert chooser.order(Want(), reports, now_s)[0] == best
        chooser.sent(Want(), best, now_s)
    assert chooser.order(Want(), reports, 0.21 + SENT_S)[0] == "a"


def test_a_conversation_stays_where_it_is_while_there_is_time_for_it():
    chooser = Chooser()
    chooser.sent(CALL, "a", -9.0)
    assert chooser.order(CALL, {"a": report(busy=7), "b": report()}, 0.0)[0] == "a"
    assert chooser.order(CALL, {"a": report(busy=8), "b": report()}, 0.0)[0] == "b"
    assert chooser.order(CALL, {"b": report()}, 0.0) == ["b"]


def test_a_voice_goes_where_any_door_has_sent_it():
    want = Want("voice:anna")
    reports = {"a": report(busy=3, keys=["voice:anna"]), "b": report()}
    assert Chooser().order(want, reports, 0.0)[0] == "a"


def test_new_conversations_are_spread_over_replicas_that_seem_alike():
    chooser, reports = Chooser(), {"a": report(capacity=8), "b": report(capacity=7)}
    assert ALIKE * 8 <= 7
    for number in range(20):
        want = Want(f"conversation:{number}")
        chooser.sent(want, chooser.order(want, reports, 9.0 * number)[0], 9.0 * number)
    assert chooser._num_keys == {"a": 10, "b": 10}


def test_without_slack_the_shortest_wait_decides():
    reports = {"a": report(busy=9, wait_s=3.0), "b": report(busy=20, wait_s=1.0)}
    assert Chooser().order(Want(), reports, 0.0)[0] == "a"
    reports = {"a": report(busy=9, wait_s=30.0), "b": report(busy=20, wait_s=1.0)}
    assert Chooser().order(Want(), reports, 0.0)[0] == "b"


def test_replicas_that_failed_a_request_are_left_out():
    reports = {"a": report(), "b": report()}
    assert Chooser().order(Want(excluded=("a",)), reports, 0.0) == ["b"]
    assert Chooser().order(Want(excluded=("a", "b")), reports, 0.0) == []
    assert len(Chooser().order(Want(excluded=("a", "b"), patient=False), reports, 0.0)) == 2


@pytest.mark.parametrize(
    ("number", "busy", "wait_s", "refused", "expected"),
    [(1, [3], [0], [0], 1), (1, [9], [0], [0], 2), (1, [3], [0.5], [0], 2), (1, [3], [0], [1], 2),
     (2, [0, 0], [0, 0], [0, 0], 1), (2, [4, 4], [0, 0], [0, 0], 2),
     (2, [9, 9], [0.5, 0], [0, 0], 3),
     (2, [4, 0], [0.5, 0], [0, 0], 1), (2, [3], [0], [0], 2), (1, [40], [0], [0], 5)],
)  # fmt: skip
def test_the_number_of_replicas_follows_what_listeners_feel(
    number, busy, wait_s, refused, expected
):
    tables = [dict(enumerate(values)) for values in ([10] * len(busy), busy, wait_s, refused)]
    assert wanted(number, *tables) == expected


def test_a_replica_knows_how_many_streams_it_can_speak():
    times = StepTimes()
    for rows in (1, 2, 4, 8):
        for _ in range(20):
            times.observe(rows, 0, 0.008 * rows)
    assert streams_at_once(times, 32) == 7  # 0.7 of 80 ms
    assert streams_at_once(times, 4) == 4


def test_a_directory_gives_a_conversation_to_one_replica_at_a_time():
    now = [0.0]
    directory = Directory(2, 60.0, lambda: now[0])
    key, a, b = ("me", "call"), ("h", 1, "s"), ("h", 2, "s")
    assert directory.claim(key, a, None).owner is None  # others may not have told it yet
    now[0] = GRACE_S
    assert directory.claim(key, a, None).owner == a
    assert directory.save(key, a, {"turns": 1})
    assert directory.claim(key, b, None).owner == a
    assert not directory.save(key, b, {"turns": 9})
    assert directory.claim(key, b, a).state == {"turns": 1}
    assert not directory.save(key, a, {"turns": 2})
    now[0] += 61.0
    assert directory.claim(key, a, None).state is None
    for number in range(3):
        directory.save(("me", str(number)), a, {})
    assert len(directory) == 2
    directory.save(("me", "2"), a, None)
    assert len(directory) == 1


def test_a_directory_lets_one_replica_begin_a_conversation(monkeypatch):
    monkeypatch.setattr("vox_serve.cluster.directory.MAX_CLAIMED", 2)
    now = [0.0]
    directory = Directory(9, 60.0, lambda: now[0])
    now[0] += GRACE_S
    key, a, b = ("me", "call"), ("h", 1, "s"), ("h", 2, "s")
    assert directory.claim(key, a, None).owner == a
    assert directory.claim(key, b, None).owner == a
    assert directory.claim(key, b, a).owner == b  # the first one released it
    assert not directory.save(key, a, {})
    assert not directory.save(key, a, None)
    assert directory.save(key, b, {})
    assert directory.claim(key, a, None).owner == b
    for number in range(3):
        directory.claim(("me", str(number)), a, None)
    assert len(directory._claimed) == 2
    assert directory.claim(("me", "2"), b, None).owner == a
    now[0] += CLAIM_S + 1
    assert directory.claim(("me", "2"), b, None).owner == b  # the first one never began
    assert len(directory._claimed) == 1


def test_the_client_with_the_most_conversations_makes_room_in_a_directory():
    directory, owner = Directory(3, 60.0, lambda: 0.0), ("h", 1, "s")
    for client, key in (("a", "1"), ("b", "1"), ("b", "2"), ("b", "3"), ("c", "1"), ("d", "1")):
        directory.save((client, key), owner, {})
    assert sorted(directory._entries) == [("b", "3"), ("c", "1"), ("d", "1")]
    directory.save(("b", "3"), owner, None)
    assert directory._counts == {"c": 1, "d": 1}


def test_metrics_of_replicas_are_told_apart_by_a_label():
    one = b'# HELP x about\n# TYPE x counter\nx{a="1"} 2.0\n# HELP y about\n# TYPE y gauge\ny 3.0\n'
    assert merged_metrics({"r0": one, "r1": one}).decode().splitlines() == [
        "# HELP x about", "# TYPE x counter", 'x{replica="r0",a="1"} 2.0',
        'x{replica="r1",a="1"} 2.0', "# HELP y about", "# TYPE y gauge", 'y{replica="r0"} 3.0',
        'y{replica="r1"} 3.0',
    ]  # fmt: skip


def test_a_fleet_keeps_a_call_until_its_request_has_ended():
    ended = []

    class Handle:
        app_name = "voxkern"

        def options(self, method_name, stream):
            assert (method_name, stream) == ("hold", True)
            return self

        async def remote(self, want):
            yield "offer"
            await asyncio.sleep(0.01)
            ended.append(want)

    class Router:
        reports: ClassVar = {"a": report(busy=6), "b": report(busy=3), "c": None}

    async def run() -> None:
        fleet = ServeFleet(Handle())
        assert fleet.addresses() == {}
        assert await fleet.offer(CALL) == "offer"
        assert len(fleet._calls) == 1
        await asyncio.gather(*fleet._calls)
        assert ended == [CALL]
        ROUTERS["voxkern"] = Router()
        try:
            fleet.wait()
            assert list(fleet.addresses()) == ["a", "b"]
            assert (fleet.slack(()), fleet.slack(("b",)), fleet.slack(("a", "b"))) == (5, 2, 0)
        finally:
            del ROUTERS["voxkern"]

    asyncio.run(run())


def test_a_router_keeps_the_task_that_lets_a_replica_drain(monkeypatch):
    pytest.importorskip("ray", reason="needs Ray: pip install 'voxkern[cluster]'")
    from vox_serve.cluster import fleet, router

    told = []

    async def tell(address, what) -> None:
        told.append((address.port, what))

    class Replica:
        replica_id = SimpleNamespace(unique_id="a")
        routing_stats = report().as_dict()

    monkeypatch.setattr(router, "tell", tell)
    monkeypatch.setattr(fleet, "ROUTERS", {})

    async def run() -> None:
        own = router.WorkRouter.__new__(router.WorkRouter)
        monkeypatch.setattr(router.WorkRouter, "_event_loop", asyncio.get_running_loop())
        monkeypatch.setattr(router.WorkRouter, "app_name", "voxkern", raising=False)
        replicas = {"a": Replica()}
        monkeypatch.setattr(router.WorkRouter, "curr_replicas", replicas)
        monkeypatch.setattr(
            router.RequestRouter, "update_replicas", lambda self, new: replicas.clear()
        )
        own.initialize_state()
        own.update_replicas([])
        (telling,) = own._telling
        await telling
        await asyncio.sleep(0)
        assert told == [(1, "drain")]
        assert not own._telling

    asyncio.run(run())
