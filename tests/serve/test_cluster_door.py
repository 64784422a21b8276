"""The door of a cluster and the servers of its replicas, in one process: see local_cluster.py."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading

import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Close

from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine, expected_pcm
from live_client import live_client
from live_server import wait_until
from local_cluster import LocalCluster
from vox_serve.audio import wav_file, wav_header
from vox_serve.cluster.live_bridge import _join


def post(cluster, path="/generate", headers=None, **body) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=TIMEOUT_S)
    kind = {"Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(body), kind | (headers or {}))
    return connection.getresponse()


def get(cluster, path, method="GET", **headers) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=TIMEOUT_S)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


def test_an_answer_is_a_replicas_own():
    with LocalCluster([FakeEngine(), FakeEngine()]) as cluster:
        answer = post(cluster, text="hello")
        assert answer.status == 200
        assert answer.read() == wav_file(expected_pcm("hello", 3))
        names = [name.lower() for name, _ in answer.getheaders()]
        assert len(names) == len(set(names))
        assert {"date", "server", "x-request-id", "content-length"} <= set(names)
        assert post(cluster, text=" ").status == 422
        assert post(cluster, path="/nothing").status == 404
        assert post(cluster, headers={"Origin": "https://evil.example"}, text="a").status == 403


def test_a_stream_begins_with_its_first_frame_and_ends_with_its_client():
    engines = [FakeEngine(num_frames=ENDLESS, step_s=0.002)]
    with LocalCluster(engines) as cluster:
        answer = post(cluster, text="hello", streaming=True)
        assert answer.getheader("transfer-encoding") == "chunked"
        first = wav_header(None) + expected_pcm("hello", 1)
        assert answer.read(len(first)) == first
        answer.close()
        assert engines[0].saw_abort.wait(TIMEOUT_S)
        tickets = cluster.replicas[0].server.tickets
        wait_until(lambda: not len(tickets))


def test_a_websocket_speaks_through_the_door():
    with LocalCluster([FakeEngine(), FakeEngine()]) as cluster:
        with live_client(cluster.port) as client:
            client.send("session", format="pcm")
            assert client.event()["type"] == "ready"
            done = client.speak(["Hel", "lo."])
            assert done["finish_reason"] == "stop"
            assert client.audio[1] == expected_pcm("Hello.", 3)
        wait_until(lambda: not any(len(r.server.tickets) for r in cluster.replicas))


def test_a_replicas_close_code_reaches_a_client_that_is_sending():
    closed = ConnectionClosedError(Close(1012, "restart"), Close(1012, "restart"), True)
    sent = []

    class Upstream:
        async def send(self, _) -> None:
            raise closed

        async def recv(self) -> str:
            await asyncio.sleep(0.01)
            raise closed

    async def receive() -> dict:
        return {"type": "websocket.receive", "text": "more"}

    async def send(message) -> None:
        sent.append(message)

    asyncio.run(_join(Upstream(), receive, send))
    assert sent == [{"type": "websocket.close", "code": 1012, "reason": "restart"}]


def test_the_client_of_a_request_is_the_doors_client():
    body = b'{"text": "hello", "streaming": true}'
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with LocalCluster([FakeEngine(num_frames=ENDLESS, step_s=0.002)]) as cluster:
        address, own = ("127.0.0.1", cluster.port), ("127.0.0.3", 0)
        raw = socket.create_connection(address, TIMEOUT_S, source_address=own)
        raw.sendall(head + body)
        raw.recv(1)
        (job,) = cluster.replicas[0].server.runner._jobs.values()
        assert job.client == "127.0.0.3"
        raw.close()


def test_requests_that_have_not_begun_are_sent_elsewhere_when_their_replica_dies():
    slow, fast = FakeEngine(num_frames=ENDLESS, prepare_s=0.3), FakeEngine()
    with LocalCluster([slow, fast]) as cluster:
        cluster.fleet.chooser._slack = lambda name, *_: 9 if name == "r0" else 1
        with cut_later(cluster.replicas[0]):
            answer = post(cluster, text="hello", streaming=True)
            assert answer.status == 200
            assert answer.read() == wav_header(None) + expected_pcm("hello", 3)
        assert [name for name, _ in cluster.fleet.sent] == ["r0", "r1"]


@contextlib.contextmanager
def cut_later(replica):
    timer = threading.Timer(0.15, replica.kill)
    timer.start()
    yield
    timer.join()


def test_a_stream_is_cut_visibly_when_its_replica_dies():
    with LocalCluster([FakeEngine(num_frames=ENDLESS, step_s=0.002), FakeEngine()]) as cluster:
        cluster.fleet.chooser._slack = lambda name, *_: 9 if name == "r0" else 1
        answer = post(cluster, text="hello", streaming=True)
        answer.read(100)
        cluster.replicas[0].kill()
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
        assert post(cluster, text="next").read() == wav_file(expected_pcm("next", 3))


def test_a_draining_replica_gets_no_requests_and_ends_its_own():
    with LocalCluster(
        [FakeEngine(num_frames=9, step_s=0.05), FakeEngine()], drain_s=9.0
    ) as cluster:
        cluster.fleet.chooser._slack = lambda name, *_: 9 if name == "r0" else 1
        answer = post(cluster, text="hello", streaming=True)
        cluster.replicas[0].server.drain()
        wait_until(lambda: cluster.replicas[0].server.runner.draining)
        assert post(cluster, text="next").read() == wav_file(expected_pcm("next", 3))
        assert answer.read() == wav_header(None) + expected_pcm("hello", 9)


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/health", "/metrics"])
def test_probes_wait_for_no_replica(path):
    with LocalCluster([FakeEngine()]) as cluster:
        refused = {"Origin": "https://evil.example", "Host": "x"}
        assert get(cluster, path, **refused).status == 403
        for is_dead in (False, True):
            if is_dead:
                cluster.replicas[0].kill()
            status = 503 if is_dead and path != "/health/live" else 200
            assert get(cluster, path).status == get(cluster, path, method="HEAD").status == status
        cluster.fleet.replicas.clear()
        answer = get(cluster, path)
        assert answer.status == status
        if status == 503:
            assert json.loads(answer.read())["reason"].startswith("no replica can serve")
        assert cluster.fleet.sent == []


def test_a_cluster_is_ready_while_one_replica_is():
    with LocalCluster([FakeEngine(), FakeEngine()], drain_s=9.0) as cluster:
        for index, status in enumerate((200, 503)):
            cluster.replicas[index].server.drain()
            wait_until(lambda server=cluster.replicas[index].server: server.runner.draining)
            assert get(cluster, "/health/ready").status == status


def test_a_path_of_a_proxy_tells_the_conversation():
    with LocalCluster([FakeEngine()], root_path="tts") as cluster:
        for root in ("/tts", ""):
            assert get(cluster, f"{root}/health/live").status == 200
            assert get(cluster, f"{root}/v1/conversations/call").status == 404
        assert [want.key for _, want in cluster.fleet.sent] == ["conversation:call"] * 2


@pytest.mark.parametrize("expected", ["100-Continue", "nothing", "100-continue, more"])
def test_a_body_is_sent_whatever_its_client_expects(expected):
    with LocalCluster([FakeEngine()]) as cluster:
        answer = post(cluster, headers={"Expect": expected}, text="hello")
        assert answer.status == 200
        assert answer.read() == wav_file(expected_pcm("hello", 3))


def test_health_and_metrics_are_those_of_all_replicas():
    with LocalCluster([FakeEngine(), FakeEngine()]) as cluster:
        for _ in range(3):
            post(cluster, text="hello").read()
        state = json.loads(get(cluster, "/health").read())
        assert state["status"] == "ok"
        assert state["counts"]["finished"] == {"stop": 3}
        assert state["max_queue_size"] == 128
        assert sorted(state["replicas"]) == ["r0", "r1"]
        assert get(cluster, "/health/live").status == get(cluster, "/health/ready").status == 200
        text = get(cluster, "/metrics").read().decode()
        for name in ("r0", "r1"):
            assert f'voxkern_ready{{replica="{name}"}} 1.0' in text
        assert text.count("# HELP voxkern_ready ") == 1


def say(cluster, text="hello", key="call", **fields) -> bytes:
    answer = post(cluster, text=text, conversation=key, **fields)
    assert answer.status == 200
    return answer.read()


def turns(cluster, key="call") -> list[str]:
    answer = get(cluster, f"/v1/conversations/{key}")
    assert answer.status == 200, answer.read()
    return [turn["text"] for turn in json.loads(answer.read())["turns"]]


def prefer(cluster, name) -> None:
    """Let a replica have the most slack, and nothing be cached anywhere."""
    cluster.fleet.chooser._slack = lambda other, *_: 9 if other == name else 1
    cluster.fleet.chooser._homes = lambda *_: set()


def contexts(engine) -> list[list[str]]:
    return [[s.text for s in request.context or ()] for request in engine.requests]


def test_a_conversation_goes_on_at_another_replica():
    with LocalCluster([FakeEngine(), FakeEngine()]) as cluster:
        for name in ("r0", "r1", "r0"):
            prefer(cluster, name)
            say(cluster, f"turn at {name}")
        assert turns(cluster) == ["turn at r0", "turn at r1", "turn at r0"]
        first, second = (replica.engine for replica in cluster.replicas)
        assert contexts(second) == [["turn at r0"]]
        assert contexts(first) == [[], ["turn at r0", "turn at r1"]]


def test_a_conversation_goes_on_when_its_replica_has_died():
    with LocalCluster([FakeEngine(), FakeEngine()]) as cluster:
        prefer(cluster, "r0")
        say(cluster, "one")
        say(cluster, "two")
        codes = [list(t.codes.ravel()) for t in kept(cluster, 0).turns]
        cluster.replicas[0].kill()
        say(cluster, "three")
        assert turns(cluster) == ["one", "two", "three"]
        assert [list(t.codes.ravel()) for t in kept(cluster, 1).turns][:2] == codes


def kept(cluster, index):
    app = cluster.replicas[index].server.app
    return app.state.conversations.kept.peek("127.0.0.1", "call")


@contextlib.contextmanager
def speaking_cluster():
    """A cluster whose first replica answers in a conversation, while the other one is preferred."""
    engines = [FakeEngine(num_frames=ENDLESS, step_s=0.002), FakeEngine()]
    with LocalCluster(engines) as cluster:
        prefer(cluster, "r0")
        speaking = post(cluster, text="hello", conversation="call", streaming=True)
        speaking.read(5000)
        prefer(cluster, "r1")
        yield cluster, speaking


def test_a_request_follows_a_conversation_that_is_in_use():
    with speaking_cluster() as (cluster, speaking):
        answer = post(cluster, path="/v1/conversations/call/interrupt", played_ms=80)
        assert answer.status == 200
        assert json.loads(answer.read())["heard_s"] == 0.08
        speaking.read()
        assert turns(cluster) == ["hello"]


def test_a_request_that_cannot_follow_does_not_get_the_owners_secret(monkeypatch):
    monkeypatch.setattr("vox_serve.cluster.request_body.MAX_KEPT_BYTES", 1)
    with speaking_cluster() as (cluster, _):
        answer = post(cluster, path="/v1/conversations/call/interrupt", played_ms=80)
        assert answer.status == 503
        assert not [name for name, _ in answer.getheaders() if name.lower().startswith("x-voxkern")]


def test_the_directory_may_restart_empty():
    with LocalCluster([FakeEngine(), FakeEngine()]) as cluster:
        prefer(cluster, "r0")
        say(cluster, "one")
        directory = cluster.keeper.directory
        wait_until(lambda: len(directory))
        cluster.keeper.__init__()
        wait_until(lambda: len(cluster.keeper.directory))
        prefer(cluster, "r1")
        say(cluster, "two")
        assert turns(cluster) == ["one", "two"]


def test_a_deleted_conversation_is_gone_everywhere():
    with LocalCluster([FakeEngine(), FakeEngine()]) as cluster:
        prefer(cluster, "r0")
        say(cluster, "one")
        connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=TIMEOUT_S)
        prefer(cluster, "r1")
        connection.request("DELETE", "/v1/conversations/call")
        assert connection.getresponse().status == 200
        for name in ("r0", "r1"):
            prefer(cluster, name)
            assert get(cluster, "/v1/conversations/call").status == 404
        wait_until(lambda: not len(cluster.keeper.directory))
