"""A cluster of two replicas with real Ray and real HTTP."""

import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("ray", reason="needs Ray: pip install 'voxkern[cluster]'")

from checkpoints import build_tiny
from cluster_process import ClusterProcess, flags
from live_client import live_client
from vox_serve.cluster.choice import SENT_S

pytestmark = pytest.mark.slow

NUM_FRAMES = 8
LONG = 700
"""Frames of a stream that outlasts a test."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = build_tiny(seed=5).write(tmp_path_factory.mktemp("checkpoint"))
    with ClusterProcess(*flags(folder), "--max_frames_limit", "100000") as cluster:
        yield cluster


def speak(cluster, text: str, seed: int, **fields) -> bytes:
    answer = cluster.speak(text, seed=seed, **({"max_frames": NUM_FRAMES} | fields))
    assert answer.status == 200, answer.read()
    return answer.read()


def test_all_replicas_answer_alike(cluster):
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda n: speak(cluster, "Hello.", 7, streaming=n % 2 == 0), range(8))
        )
    assert len({answer[44:] for answer in answers}) == 1
    cluster.wait_until(lambda: cluster.health()["counts"]["finished"] == {"length": 8})
    replicas = cluster.health()["replicas"]
    assert len(replicas) == 2
    ready = [f'voxkern_ready{{replica="{name}"}} 1.0' for name in replicas]

    def has_all() -> bool:
        metrics = cluster.request("GET", "/metrics").read().decode()
        return all(line in metrics for line in ready)

    cluster.wait_until(has_all)


def test_errors_are_those_of_one_server(cluster):
    assert cluster.speak(" ").status == 422
    assert cluster.request("GET", "/nothing").status == 404
    assert cluster.request("GET", "/health/ready").status == 200
    assert cluster.request("GET", "/v1/models").status == 200


def test_a_client_that_leaves_ends_its_request(cluster):
    before = cluster.health()["counts"]["cancelled"]
    answer = cluster.speak("Hello.", streaming=True, max_frames=LONG)
    answer.read(5000)
    answer.close()
    cluster.wait_until(lambda: cluster.health()["counts"]["cancelled"] == before + 1)
    cluster.wait_until(lambda: cluster.health()["live_requests"] == 0)


def test_a_websocket_speaks(cluster):
    with live_client(cluster.port) as client:
        client.send("session", format="pcm", max_frames=NUM_FRAMES)
        assert client.event()["type"] == "ready"
        assert client.speak(["Hel", "lo."])["samples"] > 0


def test_the_second_turn_of_conversations_is_cached_and_the_load_is_balanced(cluster):
    def sums() -> tuple[int, list[int]]:
        caches = [replica["cache"] for replica in cluster.health()["replicas"].values()]
        found = [cache["positions_found"] for cache in caches]
        return sum(found), [cache["positions_asked"] for cache in caches]

    keys = [f"twenty-{n}" for n in range(20)]
    _, asked_before = sums()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: speak(cluster, f"{key} begins.", 1, conversation=key), keys))
    num_hits = 0
    for key in keys:
        before, _ = sums()
        speak(cluster, "And it goes on.", 2, conversation=key)
        num_hits += sums()[0] > before
    print(f"{num_hits} of {len(keys)} second turns were cached")
    assert num_hits >= 19
    asked = [after - before for after, before in zip(sums()[1], asked_before, strict=True)]
    print(f"positions asked for at each replica: {asked}")
    assert max(asked) <= 1.2 * sum(asked) / 2


def live_requests(cluster) -> dict[str, int]:
    """The requests of each replica."""
    states = cluster.health()["replicas"]
    return {name: state["live_requests"] for name, state in states.items()}


def begin_stream(cluster, seed: int):
    """Begin a long stream; return its answer, what was read of it, and its replica's name."""
    before = live_requests(cluster)
    answer = cluster.speak("Hello.", seed=seed, streaming=True, max_frames=LONG)
    begun = answer.read(5000)
    after = live_requests(cluster)
    (name,) = (name for name in after if after[name] > before.get(name, 0))
    return answer, begun, name


def rest(answer) -> bytes | None:
    """The rest of an answer; None if it is cut."""
    try:
        return answer.read()
    except http.client.IncompleteRead:
        return None


def test_a_replica_may_die(cluster):
    """Streams of the other one go on, requests that have not begun are answered, and conversations
    go on with the codes that they would have had."""
    seeds = range(4)
    undisturbed = [speak(cluster, "Hello.", seed, max_frames=LONG)[44:] for seed in seeds]
    for seed in (1, 2):
        speak(cluster, f"Turn {seed}.", seed, conversation="alone")
    alone = cluster.codes("alone")
    keys = [f"death-{n}" for n in range(20)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: speak(cluster, "Turn 1.", 1, conversation=key), keys))
        cluster.wait_until(lambda: not any(live_requests(cluster).values()))
        time.sleep(2 * SENT_S)  # until the router no longer counts the turns above
        streams = [begin_stream(cluster, seed) for seed in seeds]
        before = {name for _, _, name in streams}
        assert len(before) == 2
        whole = [
            pool.submit(speak, cluster, "Hello.", seed, max_frames=LONG, timeout_s=120)
            for seed in seeds
        ]
        cluster.wait_until(lambda: sum(live_requests(cluster).values()) > len(streams))
        victim, other = cluster.replicas()
        os.kill(victim, signal.SIGKILL)
        rests = [pool.submit(rest, answer) for answer, _, _ in streams]
        turns = [
            pool.submit(speak, cluster, "Turn 2.", 2, conversation=key, timeout_s=120)
            for key in keys
        ]
        left: set[str] = set()

        def one_is_left() -> bool:
            left.clear()
            left.update(before & live_requests(cluster).keys())
            return len(left) == 1

        cluster.wait_until(one_is_left)
        lost = before - left
        assert [answer.result()[44:] for answer in whole] == undisturbed
        for (_, begun, name), end, expected in zip(streams, rests, undisturbed, strict=True):
            if name in lost:
                assert end.result() is None
            else:
                assert (begun + end.result())[44:] == expected
        assert all(turn.result() for turn in turns)
    assert [cluster.codes(key) for key in keys] == [alone] * len(keys)
    cluster.wait_until(lambda: len(cluster.health()["replicas"]) == 2)
    assert other in cluster.replicas()


def test_a_cluster_ends_without_leaving_anything(cluster):
    assert cluster.stop() == 0
    cluster.wait_until(lambda: cluster.pids() == [])
    assert json.dumps(cluster.pids()) == "[]"
