"""A replica: one engine on one device with its server, run by Ray Serve."""

import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from vox_serve.cluster.door import Offer, Want
from vox_serve.cluster.home import add_home
from vox_serve.cluster.keeper import RemoteKeeper
from vox_serve.cluster.private_server import PrivateServer
from vox_serve.cluster.report import Reporter
from vox_serve.config import Config
from vox_serve.launch import load_app
from vox_serve.logs import server_log
from vox_serve.runner import Runner

NAMED_ROWS = 64
"""Rows of each table that tell a model from another one."""

MAX_CONVERSATIONS = 100_000
"""Most conversations of a cluster. Each takes at most 128 KiB at CSM-1B's size."""


class Replica:
    """The class of the deployment.

    Args:
        settings: those of `Config` that are not the default.
        host: address at which doors reach it; None for the node's.

    Raises:
        ConfigError, ValueError, OSError, RuntimeError: see `load_app` and `PrivateServer`.
    """

    def __init__(self, settings: dict[str, Any], host: str | None = None) -> None:
        import ray
        from ray import serve

        self._name = serve.get_replica_context().replica_id.unique_id
        config = Config(**settings)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(server_log(config.log_level, config.log_format))
        runner, app, model = self.load(config)
        address = host or ray.util.get_node_ip_address()
        self._server = PrivateServer(config, runner, app, address)
        keeper = RemoteKeeper(MAX_CONVERSATIONS, config.conversation_idle_s)
        add_home(self._server, app, keeper, model)
        self._server.start()
        self._refused = 0
        self._reporter = Reporter(self._server.runner, self._server.address)

    def load(self, config: Config) -> tuple[Runner, FastAPI, str]:
        """The replica's runner and application, and its model's name; see `load_app`."""
        runner, app = load_app(config)
        return runner, app, model_name(config, runner.engine)

    async def hold(self, want: Want) -> AsyncIterator[Offer]:
        """Give a ticket for a request, and stay until its connection has ended, so that Ray Serve
        counts the request for as long as it lasts."""
        self._reporter.took(want.key)
        number, done = self._server.tickets.issue()
        try:
            yield Offer(self._name, self._server.address, number)
            await done
        finally:
            self._server.tickets.close(number)

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose engine can serve no more, or that drains: it asks none
        that it has told to end."""
        status, reason = self._server.runner.status
        if reason is not None and status != "warming":
            raise RuntimeError(reason)

    def record_routing_stats(self) -> dict[str, Any]:
        """For `WorkRouter`."""
        return self._reporter.report().as_dict()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scale`."""
        report = self._reporter.report()
        refused, self._refused = report.refused - self._refused, report.refused
        stats = {"capacity": report.capacity, "busy": report.busy, "wait_s": report.wait_s}
        return {name: float(value) for name, value in (stats | {"refused": refused}).items()}

    def __del__(self) -> None:
        """Ray Serve calls this when all tickets have ended, or their time is over."""
        if server := getattr(self, "_server", None):
            server.stop()


def model_name(config: Config, engine: Any) -> str:
    """A name of a model, by its settings and by weights that `--quantize` and `--dtype` keep.

    Args:
        config: names it.
        engine: speaks with it.
    """
    import torch

    digest = hashlib.sha256(f"{config.model}\n{config.adapter}\n".encode())
    weights = engine.model.weights
    for table in (weights.audio_table, weights.code0_head, engine.mimi.quantizer.table):
        rows = table[:NAMED_ROWS].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(rows.numpy().tobytes())
    return digest.hexdigest()
