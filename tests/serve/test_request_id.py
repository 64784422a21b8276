"""Every answer carries a request id, and the speech of a request begins with it."""

import http.client
import re
import socket

import pytest
from fastapi.testclient import TestClient

from fake_engine import TIMEOUT_S, FakeEngine
from live_server import LiveServer
from vox_serve.api import create_app
from vox_serve.config import Config
from vox_serve.request import Request
from vox_serve.request_id import HEADER, RequestIds, current_id
from vox_serve.runner import Runner

OURS = re.compile(r"[0-9a-f]{16}")


def serve(engine: FakeEngine, **settings) -> TestClient:
    config = Config(**settings)
    app = create_app(Runner.for_config(engine, config), config, {})
    return TestClient(app, raise_server_exceptions=False)


def test_every_answer_has_an_id_of_its_own():
    with serve(FakeEngine(), api_key="secret") as client:
        client.headers["X-API-Key"] = "secret"
        answers = [
            client.post("/generate", json={"text": "a"}),
            client.post("/generate", json={"text": "a", "streaming": True}),
            client.post("/generate", json={"text": ""}),
            client.post("/generate", json={"text": "crash"}),
            client.get("/nowhere"),
            client.get("/health", headers={"Origin": "https://foreign.example"}),
            client.post("/generate", headers={"X-API-Key": "wrong"}),
            client.head("/health"),
        ]
    assert [a.status_code for a in answers] == [200, 200, 422, 500, 404, 403, 401, 200]
    names = [answer.headers.get_list(HEADER) for answer in answers]
    assert all(len(name) == 1 and OURS.fullmatch(name[0]) for name in names)
    assert len({name for (name,) in names}) == len(names)


def test_an_answer_to_a_bug_has_an_id():
    with serve(FakeEngine()) as client:

        @client.app.get("/bug")
        def bug() -> None:
            raise KeyError("a bug")

        answer = client.get("/bug")
    assert answer.status_code == 500
    assert OURS.fullmatch(answer.headers[HEADER])
    assert client.app.statuses == {500: 1}


@pytest.mark.parametrize("name", ["7", "trace:4b/2-x", "~" * 64])
def test_a_client_may_choose_its_id(name):
    engine = FakeEngine()
    with serve(engine) as client:
        for _ in range(2):  # twice: the engine's own ids must differ
            answer = client.post("/generate", json={"text": "a"}, headers={HEADER: name})
            assert answer.headers[HEADER] == name
    first, second = (request.id for request in engine.requests)
    assert first.startswith(f"{name}-")
    assert second.startswith(f"{name}-")
    assert first != second


@pytest.mark.parametrize("name", ["", "x" * 65, "two words", "caf\xe9", "tab\tulator"])
def test_an_id_that_is_long_or_unprintable_is_replaced(name):
    with serve(FakeEngine()) as client:
        answer = client.get("/health", headers=[(HEADER.encode(), name.encode("latin-1"))])
    assert OURS.fullmatch(answer.headers[HEADER])


def test_answers_below_the_application_have_an_id():
    with LiveServer(FakeEngine()) as server:
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT_S)
        raw.sendall(b"nonsense\r\n\r\n")
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        assert answer.status == 400
        assert OURS.fullmatch(answer.getheader(HEADER))
        raw.close()


def test_a_websocket_has_an_id():
    seen = []

    async def app(scope, receive, send):
        await send({"type": "websocket.accept", "headers": [(b"a", b"b")]})
        seen.append(current_id())
        await send({"type": "websocket.close"})

    client = TestClient(RequestIds(app, {}))
    with client.websocket_connect("/", headers={HEADER: "mine"}) as socket_:
        headers = socket_.extra_headers
    assert headers == [(b"a", b"b"), (b"x-request-id", b"mine")]
    assert seen == ["mine"]


def test_a_request_outside_of_a_server_has_an_id():
    assert current_id() == ""
    assert re.fullmatch(r"request-\d+", Request("a").id)
