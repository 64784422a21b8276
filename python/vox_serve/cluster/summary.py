"""GET /metrics and /health, and the two paths below it, of all replicas in one answer."""

import asyncio
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vox_serve.access import AccessPolicy, add_access_checks
from vox_serve.cluster.private_server import Address
from vox_serve.cluster.request_body import request_headers
from vox_serve.cluster.upstream import ReplicaLostError, Upstream, connect
from vox_serve.config import Config
from vox_serve.http_io import AsciiJSONResponse, HeadAsGet

if TYPE_CHECKING:
    from vox_serve.cluster.door import Door

TIMEOUT_S = 5.0
READY_TIMEOUT_S = 2.0

Answer = tuple[int, dict[str, str], bytes]
"""A replica's: status, headers, body."""

_SUMMED = ("live_requests", "waiting_requests", "unread_bytes", "max_queue_size", "max_batch_size")
_DROPPED = ("content-length", "transfer-encoding", "x-request-id", "connection")
_SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)(?P<labels>\{.*\})?(?P<rest> .*)")


def live_app(config: Config) -> FastAPI:
    """The application that answers /health/live: the door lives, whatever its replicas do."""
    app = FastAPI(openapi_url=None)

    @app.get("/health/live")
    async def live() -> Response:
        return AsciiJSONResponse({"status": "live"})

    app.add_middleware(HeadAsGet)
    add_access_checks(app, AccessPolicy.of(config))
    return app


async def summary(door: "Door", path: str, scope: Scope, receive: Receive, send: Send) -> bool:
    """Answer for all replicas that there are now; False if there is none.

    Each is asked with the client's own headers. A refusal (401, 403) is passed on. /health/ready is
    answered by the first one that is ready.
    """
    asked = door.fleet.addresses()
    headers = [
        (name, value) for name, value in request_headers(scope) if name != b"accept-encoding"
    ]
    if path == "/metrics":  # the text format is the one that can be merged
        headers = [(name, value) for name, value in headers if name != b"accept"]
    client, target = scope.get("client"), scope["raw_path"]
    is_ready = path == "/health/ready"
    timeout_s = READY_TIMEOUT_S if is_ready else TIMEOUT_S

    async def fetch(name: str) -> tuple[str, Answer | None]:
        return name, await _fetch(asked[name], target, headers, client, timeout_s)

    found: dict[str, Answer] = {}
    for asking in asyncio.as_completed([fetch(name) for name in asked]):
        name, answer = await asking
        if answer is not None:
            found[name] = answer
            if is_ready and answer[0] == 200:
                break
    if not found:
        return False
    bodies = {name: found[name][2] for name in asked if name in found}
    refused = [answer for answer in found.values() if answer[0] not in (200, 503)]
    status, first, content = min(refused or found.values(), key=lambda answer: answer[0])
    kept = {name: value for name, value in first.items() if name not in _DROPPED}
    if status in (200, 503) and path == "/metrics":
        status, content = 200, merged_metrics(bodies)
    elif status in (200, 503) and path == "/health":
        status, state = merged_health(bodies)
        content = json.dumps(state, allow_nan=False).encode("ascii")
    if scope["method"] == "HEAD":
        kept["content-length"], content = str(len(content)), b""
    await Response(content, status, kept)(scope, receive, send)
    return True


async def _fetch(
    address: Address,
    target: bytes,
    headers: list[tuple[bytes, bytes]],
    client: Any,
    timeout_s: float,
) -> Answer | None:
    """The answer to a GET; None if the replica is lost."""
    try:
        async with asyncio.timeout(timeout_s):
            upstream = Upstream(*await connect(address, 0, client), "GET")
            try:
                upstream.write_head("GET", target, headers)
                head = await upstream.head()
                body = b"".join([piece async for piece in upstream.body()])
            finally:
                upstream.close()
    except (ReplicaLostError, TimeoutError):
        return None
    kept = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
    return head.status_code, kept, body


def merged_health(bodies: Mapping[str, bytes]) -> tuple[int, dict[str, Any]]:
    """The state of a cluster, in the shape of one server's.

    Args:
        bodies: each replica's answer to /health, by its name.

    Returns:
        The status, 200 while one of them can serve; and the first such one's state, with the
        numbers of all added up and `replicas`, the state of each.
    """
    states = {name: json.loads(body) for name, body in bodies.items()}
    able = [state for state in states.values() if "reason" not in state]
    merged: dict[str, Any] = dict(able[0] if able else next(iter(states.values())))
    for name in _SUMMED:
        if name in merged:
            merged[name] = sum(state.get(name, 0) for state in states.values())
    for name in ("counts", "cache"):
        merged[name] = _added(state.get(name, {}) for state in states.values())
    shown = ("status", "reason", "live_requests", "waiting_requests", "cache", "step_ms")
    merged["replicas"] = {
        name: {key: state[key] for key in shown if key in state} for name, state in states.items()
    }
    return 200 if able else 503, merged


def _added(tables: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Tables of numbers, and of such tables, added up."""
    total: dict[str, Any] = {}
    for table in tables:
        for name, value in table.items():
            if isinstance(value, Mapping):
                total[name] = _added([total.get(name, {}), value])
            else:
                total[name] = total.get(name, 0) + value
    return total


def merged_metrics(bodies: Mapping[str, bytes]) -> bytes:
    """The metrics of all replicas in Prometheus's text format: each sample has the label `replica`.

    Args:
        bodies: each replica's metrics, by its name.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # by name: about it, samples
    for replica, body in bodies.items():
        about, samples = families.setdefault("", ([], []))
        is_new = True
        for line in body.decode().splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                is_new = name not in families
                about, samples = families.setdefault(name, ([], []))
            if line.startswith("#"):
                if is_new:
                    about.append(line)
            elif match := _SAMPLE.fullmatch(line):
                labels = (match["labels"] or "{}")[1:-1]
                all_labels = ",".join(filter(None, (f'replica="{replica}"', labels)))
                samples.append(f"{match['name']}{{{all_labels}}}{match['rest']}")
    lines = [line for about, samples in families.values() for line in (*about, *samples)]
    return ("\n".join(lines) + "\n").encode()
