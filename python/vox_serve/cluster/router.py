"""Ray Serve's request router for replicas: `Chooser` decides.

Ray Serve sends this module's code, with copies of its globals, to the processes that route. State
that others need is therefore kept in a module that is imported there.
"""

import asyncio
import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from vox_serve.cluster import fleet
from vox_serve.cluster.choice import Chooser
from vox_serve.cluster.door import Want, tell
from vox_serve.cluster.private_server import DRAIN
from vox_serve.cluster.report import Report


class WorkRouter(RequestRouter):
    """Sends a request to the replica that has its prefix cached, or has the most slack.

    The first argument of each call is a `Want`. A replica that Ray Serve takes away is told to
    begin nothing any more: Ray waits for the requests there, and a WebSocket could stay for hours.
    """

    queue_len_response_deadline_s = 1.0
    max_queue_len_response_deadline_s = 5.0

    def initialize_state(self, **_: Any) -> None:
        self._chooser = Chooser()
        self._telling: set[asyncio.Task[None]] = set()
        fleet.ROUTERS[self.app_name] = self

    @property
    def reports(self) -> dict[str, Report | None]:
        """The newest reports of the replicas that take requests. Any thread may read them."""
        replicas = list(self.curr_replicas.values())
        return {r.replica_id.unique_id: Report.of(r.routing_stats) for r in replicas}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        before = self.reports
        super().update_replicas(replicas)
        for name in before.keys() - self.reports.keys():
            if (report := before[name]) is not None:
                telling = self._event_loop.create_task(tell(report.address, DRAIN))
                self._telling.add(telling)  # the loop itself keeps no task
                telling.add_done_callback(self._telling.discard)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas in the order in which they should be tried."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        reports = {name: Report.of(r.routing_stats) for name, r in by_name.items()}
        want = _want(pending_request)
        if pending_request is not None:  # all may be excluded: wait before the next look
            pending_request.routing_context.should_backoff = True
        return [[by_name[name]] for name in self._chooser.order(want, reports, time.monotonic())]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Note where a request went."""
        self._chooser.sent(_want(pending_request), replica_id.unique_id, time.monotonic())


def _want(pending_request: PendingRequest | None) -> Want:
    args = pending_request.args if pending_request is not None else ()
    return args[0] if args and isinstance(args[0], Want) else Want()
