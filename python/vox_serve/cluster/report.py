"""A replica's report of itself: how much more it can speak, and what it has cached."""

import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vox_serve.admission import MAX_LOAD
from vox_serve.cluster.private_server import Address
from vox_serve.deadlines import FRAME_S
from vox_serve.runner import Runner
from vox_serve.step_times import StepTimes

MAX_KEYS = 256
"""Newest keys of a report. It is sent twice a second, to all doors."""


@dataclass(frozen=True)
class Report:
    """The state of a replica.

    Attributes:
        capacity: streams that it can speak beside each other without a gap.
        busy: requests that it speaks, or that wait there.
        wait_s: predicted time to the beginning of one more stream; 0 while it has slack.
        refused: requests that it has refused for want of time or room since its start.
        keys: hashes of what its newest requests continued; see `Want.key`.
        host, port, secret: its `Address`.
    """

    capacity: int
    busy: int
    wait_s: float
    refused: int
    keys: tuple[int, ...]
    host: str
    port: int
    secret: str

    @property
    def slack(self) -> int:
        """Streams that it can take at once."""
        return self.capacity - self.busy

    @property
    def address(self) -> Address:
        return Address(self.host, self.port, self.secret)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> "Report | None":
        """The report in a replica's stats; None before its first one."""
        return cls(**stats) if stats else None


class Reporter:
    """Makes the reports of one replica. Any thread may call `report`.

    Args:
        runner: of its engine.
        address: of its server.
    """

    def __init__(self, runner: Runner, address: Address) -> None:
        self._runner, self._address = runner, address
        self._keys: OrderedDict[int, None] = OrderedDict()

    def took(self, key: str) -> None:
        """Note what a request continues."""
        if key:
            self._keys.pop(hashed := key_hash(key), None)
            self._keys[hashed] = None
            if len(self._keys) > MAX_KEYS:
                self._keys.popitem(last=False)

    def report(self) -> Report:
        runner = self._runner
        busy = sum(runner.count_jobs())
        gate, most = runner.gate, runner.engine.max_batch_size
        capacity = most if gate is None else streams_at_once(runner.engine.times, most)
        wait_s = 0.0
        if busy >= capacity and gate is not None and runner.engine.rows:
            wait_s = gate.wait_s(runner.num_waiting)
        counts = runner.totals()
        keys = tuple(self._keys.copy())
        return Report(capacity, busy, round(wait_s, 3), counts["refused"], keys, *self._address)


def streams_at_once(times: StepTimes, most: int) -> int:
    """The streams that leave time for all their frames, by the step times measured so far.

    Args:
        times: how long steps take.
        most: places of the engine.

    Returns:
        1 to `most`.
    """
    rows = np.arange(most + 1)
    cost = (times.lately * times.table(most)[: most + 1] + rows * times.prompt_s) / FRAME_S
    return max(1, int(np.flatnonzero(cost <= MAX_LOAD)[-1]))


def key_hash(key: str) -> int:
    """A hash that is the same in all processes: 32 bits."""
    return zlib.crc32(key.encode())
