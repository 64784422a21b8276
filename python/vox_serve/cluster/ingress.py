"""A door for the requests of Ray Serve's own HTTP proxy."""

from typing import Any

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from vox_serve.cluster.door import Door
from vox_serve.cluster.fleet import ServeFleet
from vox_serve.config import Config

_doors: list[Door] = []


def _app() -> ASGIApp:
    """The application of the door that this process has."""
    (door,) = _doors

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await door.app(scope, receive, send)
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})

    return app


@serve.ingress(_app)
class Ingress:
    """Passes on what Ray's proxy hands over.

    Args:
        handle: of the deployment `Replica`.
        settings: of the replicas.
    """

    def __init__(self, handle: Any, settings: dict[str, Any]) -> None:
        _doors[:] = [Door(ServeFleet(handle), Config(**settings))]
