"""Runs the tests of the HTTP interface through a cluster's door: `pytest --door`.

Each server of a test becomes one replica's server, reached through a door. Nothing of the tests
changes: the same requests, another way.
"""

import asyncio

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import live_server
from vox_serve import launch
from vox_serve.cluster.door import Door, Offer
from vox_serve.cluster.private_server import PrivateServer
from vox_serve.config import Config


class OneReplica:
    """A `Fleet` of one server."""

    def __init__(self, server: PrivateServer):
        self.server = server

    async def offer(self, _) -> Offer:
        return Offer("r0", self.server.address, self.server.tickets.issue()[0])

    def addresses(self):
        return {"r0": self.server.address}

    def slack(self, _) -> float:
        return 0


class ThroughDoor:
    """An application whose requests take the way of a cluster while it is started."""

    def __init__(self, app: FastAPI):
        self._app = app
        self._door: Door | None = None

    def __getattr__(self, name: str):
        return getattr(self._app, name)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._door is None:
            await self._app(scope, receive, send)
        else:
            await self._door.app(scope, receive, send)

    async def _live(self, receive, send) -> None:
        config = Config(log_level="warning", drain_s=0.0)
        server = PrivateServer(config, self._app.state.voices._runner, self._app)
        await receive()
        await asyncio.to_thread(server.start)
        self._door = Door(OneReplica(server), config)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await asyncio.to_thread(server.stop)
        await send({"type": "lifespan.shutdown.complete"})


@pytest.fixture(scope="session", autouse=True)
def _door(request):
    """Patches the two ways in which tests start a server."""
    if not request.config.getoption("--door"):
        yield
        return
    init = TestClient.__init__
    make_server = launch.make_server

    def init_through(self, app, *args, **kwargs) -> None:
        init(self, ThroughDoor(app) if isinstance(app, FastAPI) else app, *args, **kwargs)

    def make_through(app, runner, config, listener):
        private = PrivateServer(config, runner, app)
        door = Door(OneReplica(private), config)
        server = make_server(
            door.app, door, config, listener, lifespan="off", date_header=False, server_header=False
        )
        startup, shutdown = server.startup, server.shutdown

        async def start(sockets=None) -> None:
            await asyncio.to_thread(private.start)
            await startup(sockets)

        async def stop(sockets=None) -> None:
            await shutdown(sockets)
            await asyncio.to_thread(private.stop)

        server.startup, server.shutdown = start, stop
        return server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TestClient, "__init__", init_through)
        patch.setattr(launch, "make_server", make_through)
        patch.setattr(live_server, "make_server", make_through)
        yield
