"""Foreign web pages, rebound host names and clients without a key."""

import pytest
from fastapi.testclient import TestClient
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from fake_engine import FakeEngine
from http_testing import assert_refused
from vox_serve import launch
from vox_serve.access import AccessPolicy, _KeyCheck, _peer
from vox_serve.api import create_app
from vox_serve.config import Config, ConfigError
from vox_serve.runner import Runner

SPEAK = {"text": "hello", "max_frames": 1}
SECRET = "s3cret-one"


def make_app(**settings):
    return create_app(Runner(FakeEngine(), 8), Config(**settings), {})


@pytest.fixture
def serve():
    """A client of a server with the given settings, which sends the Host of `base_url`."""
    clients = []

    def start(base_url="http://127.0.0.1:8000", **settings) -> TestClient:
        clients.append(TestClient(make_app(**settings), base_url=base_url))
        return clients[-1].__enter__()

    yield start
    for client in clients:
        client.__exit__()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "localhost.", "a.localhost", "127.9.9.9",
     "[::1]:8000", "[::ffff:127.0.0.1]", "voxkern:8000"],
)  # fmt: skip
def test_a_loopback_server_accepts_its_own_names(host, serve):
    assert serve().post("/generate", json=SPEAK, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example",
     "8.8.8.8", "evil.example@localhost", "localhost:80@evil.example", "[::1", "a b", ""],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/generate", "/health", "/docs"])
def test_a_loopback_server_refuses_a_rebound_name(host, path, serve):
    answer = serve().get(path, headers={"Host": host})
    assert_refused(answer, 403, "--allowed_hosts")


def test_allowed_hosts_adds_names_and_is_then_complete(serve):
    client = serve(allowed_hosts="tts.example, other.example:443")
    for host, status in [("tts.example:99", 200), ("other.example", 200), ("evil.example", 403),
                         ("short", 403), ("127.0.0.1", 200)]:  # fmt: skip
        assert client.get("/health", headers={"Host": host}).status_code == status, host
    everywhere = serve(host="0.0.0.0", allowed_hosts="tts.example")
    assert everywhere.get("/health", headers={"Host": "evil.example"}).status_code == 403
    everybody = serve(allowed_hosts="*")
    assert everybody.get("/health", headers={"Host": "evil.example"}).status_code == 200


def test_a_probe_may_name_an_address(serve):
    client = serve(host="0.0.0.0", allowed_hosts="tts.example")
    for path, status_code in (("/health/live", 200), ("/health/ready", 200), ("/health", 403)):
        assert client.get(path, headers={"host": "10.1.2.3:8000"}).status_code == status_code


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.7"])
def test_a_server_of_the_network_accepts_any_name_by_default(host, serve):
    answer = serve(host=host).get("/health", headers={"Host": "tts.example"})
    assert answer.status_code == 200


def test_a_page_of_another_origin_is_refused_before_anything_is_computed():
    engine = FakeEngine()
    app = create_app(Runner(engine, 8), Config(), {})
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for origin in ["https://evil.example", "http://127.0.0.1:3000", "https://127.0.0.1",
                       "http://localhost:8000", "null", "", "http://127.0.0.1:8000.evil.example",
                       "http://127.0.0.1:80001", "://127.0.0.1:8000", "127.0.0.1"]:  # fmt: skip
            for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
                headers = {"Origin": origin, "Content-Type": kind}
                answer = client.post("/generate", content=b'{"text": "hi"}', headers=headers)
                assert_refused(answer, 403, "--cors_origins")
                assert "access-control-allow-origin" not in answer.headers
            for path in ("/health", "/docs", "/nowhere"):
                assert client.get(path, headers={"Origin": origin}).status_code == 403
            preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            assert client.options("/generate", headers=preflight).status_code == 403
    assert engine.requests == []


@pytest.mark.parametrize(
    ("base_url", "origin"),
    [("http://127.0.0.1:8000", "http://127.0.0.1:8000"), ("http://localhost", "http://localhost"),
     ("http://localhost", "http://localhost:80"), ("http://localhost:443", "https://localhost"),
     ("http://[::1]:8000", "http://[::1]:8000")],
)  # fmt: skip
def test_the_servers_own_page_may_use_it(base_url, origin, serve):
    answer = serve(base_url).post("/generate", json=SPEAK, headers={"Origin": origin})
    assert answer.status_code == 200


def test_two_origins_are_refused():
    origins = [b"http://127.0.0.1:8000", b"https://evil.example"]
    headers = Headers(raw=[(b"host", b"127.0.0.1:8000"), *((b"origin", o) for o in origins)])
    assert not AccessPolicy.of(Config()).accepts_origin("POST", headers)


@pytest.mark.parametrize("origin", ["https://app.example", "https://app.example:443"])
@pytest.mark.parametrize("setting", ["https://app.example", "x://y, https://APP.example:443/"])
def test_allowed_origins_pass_with_cors_headers(origin, setting, serve):
    client = serve(cors_origins=setting, api_key=SECRET)
    preflight = client.options(
        "/generate",
        headers={
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in preflight.headers["access-control-allow-headers"]

    headers = {"Origin": origin, "X-API-Key": SECRET}
    assert client.post("/generate", json=SPEAK, headers=headers).status_code == 200
    refused = client.post("/generate", json=SPEAK, headers={"Origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    foreign = client.post(
        "/generate", json=SPEAK, headers=headers | {"Origin": "https://b.example"}
    )
    assert_refused(foreign, 403)


def test_a_star_allows_every_origin(serve):
    answer = serve(cors_origins="*").post(
        "/generate", json=SPEAK, headers={"Origin": "https://a.b"}
    )
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"


def fetched(site, mode="no-cors", dest="audio", **more):
    return {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest, **more}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (fetched("cross-site"), 403),
        (fetched("same-site"), 403),
        (fetched("cross-site", "navigate", "iframe"), 403),
        (fetched("cross-site", "navigate", "document"), 200),
        (fetched("same-origin"), 200),
        (fetched("none", "navigate", "document"), 200),
        (fetched("cross-site", Referer="https://app.example/page"), 200),
        (fetched("cross-site", Referer="https://evil.example/https://app.example"), 403),
    ],
)
def test_embedded_requests_without_an_origin(headers, status, serve):
    """Browsers send no Origin with the GET of an image, a script, audio or a link."""
    client = serve(cors_origins="https://app.example")
    assert client.get("/health", headers=headers).status_code == status
    assert client.post("/generate", json=SPEAK, headers=headers).status_code == (
        403 if headers["Sec-Fetch-Dest"] == "document" and "cross" in str(headers) else status
    )


@pytest.mark.parametrize(
    "headers",
    [{}, {"X-API-Key": "wrong"}, {"X-API-Key": ""}, {"Authorization": f"Basic {SECRET}"},
     {"Authorization": SECRET}, {"Authorization": "Bearer"}, {"Authorization": "Bearer two"},
     {"X-API-Key": f"{SECRET},two-keys"}, {"Authorization": f"Bearer {SECRET}é".encode()}],
)  # fmt: skip
@pytest.mark.parametrize(
    "path", ["/generate", "/v1/models", "/openapi.json", "/nowhere", "/health/x"]
)
def test_without_a_valid_key_everything_but_health_is_401(headers, path, serve):
    answer = serve(api_key=f"{SECRET},two-keys").post(path, json=SPEAK, headers=headers)
    assert_refused(answer, 401, "Bearer")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert SECRET not in answer.text


@pytest.mark.parametrize("key", [SECRET, "two-keys"])
@pytest.mark.parametrize("spell", ["Bearer {}", "bearer  {}", None])
def test_each_key_opens_the_server(key, spell, serve):
    headers = {"Authorization": spell.format(key)} if spell else {"X-API-Key": key}
    answer = serve(api_key=f" {SECRET} , two-keys,").post("/generate", json=SPEAK, headers=headers)
    assert answer.status_code == 200


def test_health_needs_no_key_and_shows_none(serve):
    client = serve(api_key=SECRET)
    for path in ("/health", "/health/live", "/health/ready"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert SECRET not in answer.text


def test_a_websocket_passes_the_same_checks():
    app = make_app(api_key=SECRET)

    @app.websocket("/echo")
    async def echo(socket: WebSocket):
        await socket.accept()
        await socket.send_text(await socket.receive_text())

    client = TestClient(app, base_url="http://127.0.0.1:8000")
    key = {"X-API-Key": SECRET}
    with client.websocket_connect("ws://127.0.0.1:8000/echo", headers=key) as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "hello"
    for headers in ({}, {**key, "Origin": "https://evil.example"}, {**key, "Host": "evil.example"}):
        with (
            pytest.raises((WebSocketDisconnect, RuntimeError)),
            client.websocket_connect("ws://127.0.0.1:8000/echo", headers=headers) as socket,
        ):
            socket.receive_text()


def test_a_client_is_known_by_its_key_else_by_its_address():
    seen = []

    async def note(scope, receive, send):
        seen.append(scope["state"]["client"])
        await Response()(scope, receive, send)

    app = _KeyCheck(note, AccessPolicy(keys=(b"one", b"two")))
    client = TestClient(app, client=("192.0.2.1", 5))
    client.get("/", headers={"X-API-Key": "two"})
    client.get("/health")
    assert seen == ["key 1", "192.0.2.1"]


@pytest.mark.parametrize(
    ("address", "name"),
    [("192.0.2.1", "192.0.2.1"), ("2001:db8::1:2", "2001:db8::/64"), ("fe80::1%eth0", "fe80::/64"),
     ("::ffff:192.0.2.1", "192.0.2.1"), ("/run/socket", "/run/socket")],
)  # fmt: skip
def test_an_ipv6_client_is_its_network(address, name):
    assert _peer({"client": (address, 1)}) == name


@pytest.mark.parametrize(
    "settings",
    [{"api_key": ""}, {"api_key": " "}, {"api_key": ","}, {"api_key": "se cret"},
     {"api_key": "sécret"}, {"cors_origins": "app.example"}, {"cors_origins": "https://a.b/c"},
     {"allowed_hosts": "https://a.b"}],
)  # fmt: skip
def test_a_malformed_setting_is_refused_and_a_key_not_shown(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=name) as error:
        AccessPolicy.of(Config(**settings))
    assert name != "api_key" or len(value) < 2 or value not in str(error.value)


def test_a_wrong_setting_is_one_line_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(launch, "make_engine", lambda *_: pytest.fail("loaded a model"))
    assert launch.main(["--port", "0", "--api_key", "se cret"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vox-serve: error: api_key must be")
    assert "cret" not in line


def test_an_empty_variable_does_not_open_the_server(monkeypatch):
    monkeypatch.setenv("VOX_SERVE_API_KEY", "")
    with pytest.raises(ConfigError, match="VOX_SERVE_API_KEY: must not be empty"):
        Config()
    monkeypatch.setenv("VOX_SERVE_API_KEY", SECRET)
    assert Config().api_key == SECRET
    assert SECRET not in repr(Config())


def test_the_help_shows_no_key(monkeypatch, capsys):
    monkeypatch.setenv("VOX_SERVE_API_KEY", SECRET)
    with pytest.raises(SystemExit):
        launch.main(["--help"])
    assert SECRET not in capsys.readouterr().out
