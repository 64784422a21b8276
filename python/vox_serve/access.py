"""Who may use the server: browsers by Host and Origin, clients by API key.

A web page can send requests to any server that its visitor's browser reaches, so a server on
127.0.0.1 is not private. Two checks stop such pages. A request from another origin is refused. On
loopback so is a Host that is no name of this machine or its network: a page whose own name was made
to resolve to 127.0.0.1 counts as same-origin. Programs other than browsers send neither Origin nor
Sec-Fetch-Site and pass both.
"""

import hmac
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from vox_serve import provenance
from vox_serve.config import ConfigError, ServerSettings
from vox_serve.http_io import AsciiJSONResponse, route_path
from vox_serve.page import PAGE_PATHS

OPEN_PATHS = PAGE_PATHS | {"/health", "/health/live", "/health/ready"}
"""Paths that need no API key: load balancers and supervisors have none, and the page lets its user
type one."""

PROBE_PATHS = frozenset({"/health/live", "/health/ready"})
"""Paths that need no Host of the server's: a probe often names an address, and learns nothing but
the state."""

LIVE_PROTOCOL = "voxkern"
"""Subprotocol of the WebSocket. A browser's script can send no headers: it gives the API key as
another subprotocol, `voxkern.api_key.KEY`."""

EXPOSED_HEADERS = (
    *("Retry-After", "X-Finish-Reason", "X-Request-Id", "X-Sample-Rate"),
    provenance.HEADER,
)
"""Response headers that a page of an allowed origin may read."""

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]@/\s]+))(?::\d*)?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")
_KEY = re.compile(r"[!-+\--~]+")  # printable ASCII without the blank and the comma
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True)
class AccessPolicy:
    """The access settings, parsed.

    Attributes:
        keys: accepted API keys; empty if the server needs none.
        origins: foreign origins that may send requests; `*` stands for all.
        hosts: accepted names in Host, besides loopback's; None accepts all.
        accepts_short_hosts: accept any name without a dot too. It is not in the public DNS: the
            machine's own, a container's, or its network's.
    """

    keys: tuple[bytes, ...] = ()
    origins: frozenset[str] = frozenset()
    hosts: frozenset[str] | None = None
    accepts_short_hosts: bool = False

    @classmethod
    def of(cls, config: ServerSettings) -> "AccessPolicy":
        """Parse the settings.

        Raises:
            ConfigError: an entry is malformed. The message never shows an API key.
        """
        keys = () if config.api_key is None else _listed(config.api_key)
        if config.api_key is not None and not (keys and all(map(_KEY.fullmatch, keys))):
            raise ConfigError("api_key must be printable ASCII without blanks, and not empty")
        origins = [origin.rstrip("/").lower() for origin in _listed(config.cors_origins)]
        for origin in origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"cors_origins: {origin!r} is not like https://example.com")
        allowed = [_host_name(host) for host in _listed(config.allowed_hosts)]
        if None in allowed:
            raise ConfigError(f"allowed_hosts: {config.allowed_hosts!r} is not a list of names")
        hosts = {*filter(None, allowed), config.host.lower()}
        checks_host = (allowed or _is_loopback(config.host)) and "*" not in allowed
        return cls(
            tuple(key.encode() for key in keys),
            frozenset(map(_without_default_port, origins)),
            frozenset(hosts) if checks_host else None,
            accepts_short_hosts=not allowed,
        )

    def accepts_host(self, host: str) -> bool:
        """True if a request with this Host header may be for this server."""
        name = _host_name(host)
        if self.hosts is None:
            return True
        if name is None:
            return False
        is_short = self.accepts_short_hosts and "." not in name
        return name in self.hosts or is_short or _is_loopback_name(name)

    def accepts_origin(self, method: str, headers: Headers) -> bool:
        """False if a page of a foreign origin sent the request."""
        origins = headers.getlist("origin")
        if origins:
            return all(self._allows(origin, headers.get("host", "")) for origin in origins)
        # Browsers leave Origin out of GETs for images, scripts, audio and links.
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return True
        follows_link = (
            method in ("GET", "HEAD")
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        )
        referer = urlsplit(headers.get("referer", ""))
        return follows_link or self._allows(f"{referer.scheme}://{referer.netloc}", "")

    def key_of(self, headers: Headers) -> int | None:
        """Index of the API key that the request gives; None if it gives no valid one."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        prefix = f"{LIVE_PROTOCOL}.api_key."
        for offered in _listed(headers.get("sec-websocket-protocol")):
            given = given or (offered[len(prefix) :] if offered.startswith(prefix) else "")
        # Headers are Latin-1. All keys are compared, so that the time tells nothing.
        equal = [hmac.compare_digest(key, given.encode("latin-1")) for key in self.keys]
        return equal.index(True) if any(equal) else None

    def _allows(self, origin: str, host: str) -> bool:
        origin = _without_default_port(origin.lower())
        if "*" in self.origins or origin in self.origins:
            return True
        scheme, _, authority = origin.partition("://")
        # The scheme is not compared: a proxy may have ended TLS.
        port = _DEFAULT_PORTS.get(scheme)
        return port is not None and authority == host.lower().removesuffix(port)


def add_access_checks(app: FastAPI, policy: AccessPolicy) -> None:
    """Make the app refuse requests that `policy` does not accept."""
    # The last one added sees a request first. CORS comes before the key: a browser's preflight
    # carries no key, and a page must be able to read the refusal.
    app.add_middleware(_KeyCheck, policy=policy)
    if policy.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=policy.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
            allow_private_network=True,
        )
    app.add_middleware(_BrowserCheck, policy=policy)


class _BrowserCheck:
    """Refuses foreign hosts and origins with 403."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy):
        self.app = app
        self.policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        method = scope.get("method", "GET")  # a WebSocket's handshake has none in its scope
        is_probe = route_path(scope) in PROBE_PATHS
        if not is_probe and not all(map(self.policy.accepts_host, headers.getlist("host"))):
            detail = "this Host is not the server's: see --allowed_hosts"
        elif not self.policy.accepts_origin(method, headers):
            detail = "pages of this origin may not use the server: see --cors_origins"
        else:
            return await self.app(scope, receive, send)
        await _refuse(scope, receive, send, AsciiJSONResponse({"detail": detail}, 403))


class _KeyCheck:
    """Refuses requests without a valid API key with 401; names the client in its state."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy):
        self.app = app
        self.policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        key = self.policy.key_of(Headers(scope=scope))
        if self.policy.keys and key is None and route_path(scope) not in OPEN_PATHS:
            response = AsciiJSONResponse(
                {"detail": "send an API key: Authorization: Bearer KEY, or X-API-Key: KEY"},
                401,
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await _refuse(scope, receive, send, response)
        scope.setdefault("state", {})["client"] = _peer(scope) if key is None else f"key {key}"
        await self.app(scope, receive, send)


async def _refuse(scope: Scope, receive: Receive, send: Send, response: AsciiJSONResponse) -> None:
    if scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})  # the handshake is answered 403


def client_name(scope: Scope) -> str:
    """Whose request it is: by API key once that was checked, else by address."""
    return str(scope.get("state", {}).get("client") or _peer(scope))


def _peer(scope: Scope) -> str:
    """The client's address; of IPv6 the /64 network, which is what one host gets."""
    host = (scope.get("client") or ("unknown",))[0]
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # not an IP socket
        return host
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or ip_network((address, 64), strict=False))
    return str(address)


def _listed(text: str | None) -> tuple[str, ...]:
    """Entries of a comma-separated list; blank ones are left out."""
    return tuple(entry.strip() for entry in (text or "").split(",") if entry.strip())


def _host_name(host: str) -> str | None:
    """The name in a Host header, without brackets and port; None if it is malformed."""
    match = _HOST.fullmatch(host.lower())
    return (match[1] or match[2]).removesuffix(".") if match else None


def _without_default_port(origin: str) -> str:
    scheme = origin.partition("://")[0]
    return origin.removesuffix(_DEFAULT_PORTS.get(scheme, "/"))


def _is_loopback_name(name: str) -> bool:
    # Resolvers and browsers keep localhost and the names below it on this machine.
    return name == "localhost" or name.endswith(".localhost") or _all_loopback([name])


def _is_loopback(host: str) -> bool:
    """True if a server that listens on `host` can be reached from this machine only."""
    if not host:  # all addresses
        return False
    if _is_loopback_name(host.lower()):
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return _all_loopback(str(address[0]) for *_, address in found)


def _all_loopback(addresses: Iterable[str]) -> bool:
    try:
        parsed = [ip_address(address) for address in addresses]
    except ValueError:
        return False
    return all((getattr(ip, "ipv4_mapped", None) or ip).is_loopback for ip in parsed)
