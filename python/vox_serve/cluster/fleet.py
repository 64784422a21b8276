"""The replicas of a Ray Serve deployment, as a door sees them."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, Protocol

from vox_serve.cluster.door import Offer, Want
from vox_serve.cluster.private_server import Address
from vox_serve.cluster.report import Report

START_S = 30.0
"""Time that a new fleet waits for its first report."""


class Router(Protocol):
    """The part of `WorkRouter` that a door uses."""

    @property
    def reports(self) -> dict[str, Report | None]: ...


ROUTERS: dict[str, Router] = {}
"""The routers of this process, by the names of their applications."""


async def _until_end(call: Any) -> None:
    """Keep a call until the request's connection has ended: Ray forgets one that nobody has."""
    with contextlib.suppress(Exception):  # its replica is lost
        async for _ in call:
            pass


class ServeFleet:
    """Finds replicas with the router of a deployment's handle.

    Args:
        handle: of the deployment `Replica`.
    """

    def __init__(self, handle: Any) -> None:
        self._app_name = handle.app_name
        self._calls: set[asyncio.Task[None]] = set()
        self._hold = handle.options(method_name="hold", stream=True)

    async def offer(self, want: Want) -> Offer:
        """The consent of the replica that Ray Serve's router chooses; see `Fleet`."""
        call = self._hold.remote(want)
        found: Offer = await anext(call)
        ending = asyncio.ensure_future(_until_end(call))
        self._calls.add(ending)
        ending.add_done_callback(self._calls.discard)
        return found

    def wait(self) -> None:
        """Wait, for `START_S` at most, until a replica has reported."""
        deadline = time.monotonic() + START_S
        while not self.addresses() and time.monotonic() < deadline:
            time.sleep(0.05)

    def addresses(self) -> dict[str, Address]:
        """The servers of all replicas that have reported."""
        return {name: report.address for name, report in self._reports().items() if report}

    def slack(self, excluded: Sequence[str]) -> float:
        """Streams that other replicas can take at once."""
        reports = self._reports().items()
        return max([r.slack for name, r in reports if r and name not in excluded], default=0)

    def _reports(self) -> dict[str, Report | None]:
        router = ROUTERS.get(self._app_name)
        return router.reports if router is not None else {}
