"""The choice of a replica for a request: without a clock, and without Ray."""

from collections import OrderedDict, deque
from collections.abc import Mapping

from vox_serve.cluster.door import Want
from vox_serve.cluster.report import Report, key_hash

MAX_KEYS = 100_000

SENT_S = 1.0
"""Requests count as the sender's knowledge for so long, until the replica's report has them."""

ALIKE = 0.75
"""Replicas whose free share is at least this part of the largest are equally free."""


class Chooser:
    """Orders the replicas for each request, best first. One thread uses it.

    A request that continues something goes where that is cached: to the replica that this sender
    chose for it before, or one that reports it, unless that one has no slack for a further stream.
    Otherwise it goes to the replica with the largest free share: its slack over its capacity, since
    capacities are estimates. A new conversation or voice takes, of those that are equally free, the
    replica with the fewest; if none has slack, the shortest predicted wait decides.
    """

    def __init__(self) -> None:
        self._home: OrderedDict[str, str] = OrderedDict()  # replica by key, oldest first
        self._num_keys: dict[str, int] = {}  # by replica
        self._sent: dict[str, deque[float]] = {}  # times, by replica

    def order(self, want: Want, reports: Mapping[str, Report | None], now_s: float) -> list[str]:
        """Names of the replicas for a request, best first.

        Args:
            want: what it needs.
            reports: of all replicas; None for one that has not reported yet.
            now_s: the time.
        """
        names = [name for name in reports if name not in want.excluded]
        if not names and not want.patient:
            names = list(reports)
        free = {name: self._slack(name, reports[name], now_s) for name in names}
        homes = self._homes(want, reports)
        shares = {
            name: free[name] / max(1, report.capacity if (report := reports[name]) else 1)
            for name in names
        }
        most = max(shares.values(), default=0.0)

        def rank(name: str) -> tuple[float, ...]:
            report, slack, share = reports[name], free[name], shares[name]
            if slack <= 0:
                wait_s = report.wait_s if report else 0.0
                return (2, wait_s - slack, name not in homes)
            if name in homes:
                return (0, -share)
            if want.key and share >= ALIKE * most:
                return (1, 0, self._num_keys.get(name, 0), -share)
            return (1, 1, -share, -slack)

        return sorted(names, key=rank)

    def sent(self, want: Want, name: str, now_s: float) -> None:
        """Note that a request was sent to a replica."""
        self._sent.setdefault(name, deque(maxlen=1024)).append(now_s)
        if not want.key:
            return
        if (before := self._home.pop(want.key, None)) is not None:
            self._count(before, -1)
        self._home[want.key] = name
        self._count(name, 1)
        if len(self._home) > MAX_KEYS:
            self._count(self._home.popitem(last=False)[1], -1)

    def _count(self, name: str, change: int) -> None:
        self._num_keys[name] = self._num_keys.get(name, 0) + change
        if not self._num_keys[name]:
            del self._num_keys[name]

    def _homes(self, want: Want, reports: Mapping[str, Report | None]) -> set[str]:
        """Replicas that have cached what a request continues."""
        if not want.key:
            return set()
        if (home := self._home.get(want.key)) in reports:
            return (
                {str(home)} if want.is_conversation else {str(home), *self._reported(want, reports)}
            )
        return self._reported(want, reports)

    def _reported(self, want: Want, reports: Mapping[str, Report | None]) -> set[str]:
        hashed = key_hash(want.key)
        return {name for name, report in reports.items() if report and hashed in report.keys}

    def _slack(self, name: str, report: Report | None, now_s: float) -> float:
        sent = self._sent.get(name, deque())
        while sent and sent[0] < now_s - SENT_S:
            sent.popleft()
        return (report.slack if report else 1) - len(sent)
