"""A door for the requests of Ray Serve's own HTTP proxy."""

from typing import Any

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from vox_serve.cluster.door import Door
from vox_serve.cluster.fleet import ServeFleet
from vox_serve.config import Config

doors: list[Door] = []
"""The door of this process. Ray sends the class below with copies of its module's globals: it must
import this one."""


def _app() -> ASGIApp:
    """The application of the door that this process has."""
    from vox_serve.cluster import ingress

    (door,) = ingress.doors

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
        from vox_serve.cluster import ingress

        ingress.doors[:] = [Door(ServeFleet(handle), Config(**settings))]
