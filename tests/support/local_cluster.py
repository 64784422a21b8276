"""A cluster in this process: the real door and the real servers of replicas, without Ray."""

import asyncio
import pickle
import threading
import time
from collections.abc import Sequence

from fake_engine import TIMEOUT_S
from live_server import wait_until
from vox_serve.api import create_app
from vox_serve.cluster.choice import Chooser
from vox_serve.cluster.directory import GRACE_S, Directory
from vox_serve.cluster.door import Door, Offer, Want
from vox_serve.cluster.home import add_home
from vox_serve.cluster.private_server import Address, PrivateServer
from vox_serve.cluster.report import Reporter
from vox_serve.cluster.upstream import ReplicaLostError
from vox_serve.config import Config
from vox_serve.launch import make_server, reserve_address
from vox_serve.runner import Runner


class LocalReplica:
    """A replica's server in threads of this process."""

    def __init__(
        self, name: str, engine, config: Config, keeper: "LocalKeeper", model: str = "fake"
    ):
        self.name, self.engine = name, engine
        runner = Runner.for_config(engine, config)
        app = create_app(runner, config, {})
        self.server = PrivateServer(config, runner, app)
        add_home(self.server, app, keeper, model)
        self.server.start()
        self.reporter = Reporter(self.server.runner, self.server.address)
        self.is_dead = False

    def kill(self) -> None:
        """Cut all connections, as the end of the process would, and accept none."""
        self.is_dead = True

        def cut() -> None:
            for listener in self.server._server.servers:
                listener.close()
            for connection in list(self.server._server.server_state.connections):
                connection.transport.abort()

        self.server.loop.call_soon_threadsafe(cut)


class LocalFleet:
    """A `Fleet` with the router's `Chooser`."""

    def __init__(self, replicas: Sequence[LocalReplica]):
        self.replicas = {replica.name: replica for replica in replicas}
        self.chooser = Chooser()
        self.sent: list[tuple[str, Want]] = []

    def reports(self):
        return {name: r.reporter.report() for name, r in self.replicas.items()}

    async def offer(self, want: Want) -> Offer:
        while not (names := self.chooser.order(want, self.reports(), time.monotonic())):
            await asyncio.sleep(0.01)
        self.chooser.sent(want, names[0], time.monotonic())
        self.sent.append((names[0], want))
        replica = self.replicas[names[0]]
        replica.reporter.took(want.key)
        number, _ = replica.server.tickets.issue()
        if replica.is_dead:  # Ray Serve's router forgets it then
            del self.replicas[replica.name]
            raise ReplicaLostError("it is dead")
        return Offer(replica.name, replica.server.address, number)

    def addresses(self) -> dict[str, Address]:
        return {name: r.server.address for name, r in self.replicas.items()}

    def slack(self, excluded: Sequence[str]) -> float:
        reports = self.reports()
        return max([r.slack for name, r in reports.items() if name not in excluded] + [0])


class LocalCluster:
    """Replicas with these engines, and a door on a free port."""

    def __init__(self, engines, **settings):
        config = Config(log_level="warning", **({"drain_s": 0.0, "warm_up_s": 0.0} | settings))
        self.keeper = LocalKeeper()
        self.replicas = [
            LocalReplica(f"r{i}", engine, config, self.keeper) for i, engine in enumerate(engines)
        ]
        self.fleet = LocalFleet(self.replicas)
        self.door = Door(self.fleet, config)
        listener = reserve_address("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.server = make_server(
            self.door.app, self.door, config, listener, lifespan="off", date_header=False,
            server_header=False,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.server.run, args=([listener],))

    def __enter__(self) -> "LocalCluster":
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(TIMEOUT_S)
        for replica in self.replicas:
            replica.server.stop()
        assert not self.thread.is_alive()


class LocalKeeper:
    """A `Keeper` without Ray."""

    def __init__(self):
        self.directory = Directory(1000, 3600)
        self.directory._begun_s -= GRACE_S

    async def claim(self, key, asker, instead_of):
        return self.directory.claim(key, asker, instead_of)

    async def save(self, key, owner, state):
        return self.directory.save(key, owner, pickle.loads(pickle.dumps(state)))

    async def epoch(self):
        return self.directory.epoch
