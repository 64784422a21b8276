"""Serve speech with several replicas, one device each.

python -m vox_serve.cluster --replicas 2 --model sesame/csm-1b --port 8000
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from vox_serve.cli import CommandError, CommandParser, run_command
from vox_serve.config import ENV_PREFIX, Config, ModelSettings, ServerSettings, SpeechSettings
from vox_serve.console import standard_streams
from vox_serve.launch import announce, end_now, make_server, reserve_addresses
from vox_serve.logs import server_log

PROG = "vox-serve cluster"
MAX_REPLICAS = 1000

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
    "RAY_worker_niceness": "0",  # with Ray's 15 other programs would go before the engines
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # with Ray's 0.1 its controller takes more time
    "RAY_task_events_report_interval_ms": "0",  # nobody reads them without a dashboard
    "RAY_enable_metrics_collection": "0",  # /metrics has our own
}
"""Environment of the command, and of a Ray cluster that it starts, unless it is set already."""


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        PROG,
        description="Serve text-to-speech over HTTP with several replicas of the engine, one "
        "device each, on Ray Serve: see docs/cluster.md. The other flags are those of launch.",
        usage="vox-serve cluster [--replicas N|auto] [--model MODEL] [flags]",
        epilog="Flags are accepted with dashes too (--top-k). Each of launch's has an environment "
        f"variable, {ENV_PREFIX} and its name in capitals, which the flag overrides.",
    )
    parser.add_flag(
        "replicas", metavar="N|auto", type=_replicas, default=1, help="replicas; auto begins with "
        "one and adds more when listeners would wait [default 1]",
    )  # fmt: skip
    parser.add_flag(
        "max_replicas", metavar="N", type=_count, help="most replicas of auto [default: one for "
        "each GPU, or for each processor]",
    )  # fmt: skip
    parser.add_flag(
        "up_s", metavar="S", type=float, default=5.0, help="auto: time that more replicas are "
        "needed before one is added [default 5]",
    )  # fmt: skip
    parser.add_flag(
        "down_s", metavar="S", type=float, default=300.0, help="auto: time that fewer replicas "
        "would do before one is taken away [default 300]",
    )  # fmt: skip
    parser.add_flag(
        "address", help="of a Ray cluster that runs already (auto, or host:port); without it one "
        "is started on this machine, and ends with the command",
    )  # fmt: skip
    parser.add_flag(
        "update", action="store_true", help="give the cluster that runs at --address these "
        "settings instead, replica by replica, and end",
    )  # fmt: skip
    parser.add_settings(ModelSettings, SpeechSettings, ServerSettings)
    return parser


@standard_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = make_parser()
    args, config = parser.parse(argv)
    return run_command(PROG, lambda: serve_cluster(args, config))


def serve_cluster(args: Any, config: Config) -> int:
    """Start the replicas and serve until interrupted; return the exit code.

    Raises:
        CommandError: Ray is not installed, or the address is invalid or in use.
    """
    from vox_serve.access import AccessPolicy

    AccessPolicy.of(config)  # a wrong setting is reported before Ray is started
    try:
        import ray  # noqa: F401
        from ray import serve
    except ImportError:
        raise CommandError("this needs Ray: pip install 'voxkern[cluster]'") from None
    from vox_serve.cluster.deployment import APP_NAME, replicas
    from vox_serve.cluster.door import Door
    from vox_serve.cluster.fleet import ServeFleet

    if args.update and not args.address:
        raise CommandError("--update needs the --address of the cluster")
    with ExitStack() as stack:
        listeners = [] if args.update else reserve_addresses(config.host, config.port)
        announce(config, "Starting Ray ...")
        most = start_ray(args, config)
        stack.callback(disconnect, owns_cluster=not args.address)
        config, size = sized(args, config, most, stack)
        if args.address and not args.update:
            stack.callback(stop_application)
        serve.start(proxy_location="Disabled")
        announce(config, f"Loading {config.model} in {size.least} replicas ...")
        host = None if args.address else "127.0.0.1"
        handle = serve.run(replicas(config, size, host), name=APP_NAME, route_prefix=None)
        if args.update:
            announce(config, "All replicas have the new settings.")
            return 0
        fleet = ServeFleet(handle)
        fleet.wait()
        door = Door(fleet, config)
        server = make_server(
            door.app, door, config, listeners[0], lifespan="off", date_header=False,
            server_header=False,
        )  # fmt: skip
        with server_log(config.log_level, config.log_format):
            server.run(sockets=listeners)
    end_now(0 if server.started else 1)


def start_ray(args: Any, config: Config) -> int:
    """Connect to Ray, or start it; return the replicas that it has devices for.

    Raises:
        CommandError: there is no cluster at the address.
    """
    import ray

    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if args.address:
        try:
            ray.init(address=args.address, namespace="serve", **options)
        except (ConnectionError, ValueError) as error:
            raise CommandError(f"--address {args.address}: {error}") from None
    else:
        wanted = args.max_replicas or (args.replicas if args.replicas != "auto" else 1)
        num_threads = config.num_threads or 1
        processors = max(len(os.sched_getaffinity(0)), wanted * num_threads)
        ray.init(num_cpus=processors, include_dashboard=False, namespace="serve", **options)
    found = ray.cluster_resources()
    return int(found.get("GPU", 0) or found.get("CPU", 1))


def stop_application() -> None:
    """End our replicas and the directory in a cluster that others may use too."""
    from ray import serve

    from vox_serve.cluster.deployment import APP_NAME
    from vox_serve.cluster.keeper import stop_keeper

    serve.delete(APP_NAME)
    stop_keeper()


def disconnect(owns_cluster: bool) -> None:
    """Leave Ray; end it if the command started it."""
    import ray
    from ray import serve

    if owns_cluster:
        serve.shutdown()
    ray.shutdown()


def sized(args: Any, config: Config, most: int, stack: ExitStack) -> Any:
    """The settings of each replica, and the number of replicas.

    Without `--num_threads` the replicas on one machine share its processors. Without `--voices`
    they share a folder that ends with the command.

    Raises:
        CommandError: replicas on several machines need `--voices`.
    """
    import ray

    from vox_serve.cluster.deployment import Size, given_settings, uses_gpu

    if args.replicas == "auto":
        size = Size(1, args.max_replicas or most, args.up_s, args.down_s)
    else:
        size = Size(args.replicas, args.replicas)
    given = given_settings(config)
    if config.num_threads is None and not uses_gpu(config):
        given["num_threads"] = max(1, len(os.sched_getaffinity(0)) // size.most)
    if config.voices is None:
        if sum(node["Alive"] for node in ray.nodes()) > 1:
            raise CommandError("replicas on several machines need --voices, a folder of all")
        session = ray.get_runtime_context().get_session_name()
        given["voices"] = folder = os.path.join(tempfile.gettempdir(), f"voxkern-voices-{session}")
        if not args.update:
            os.makedirs(folder, 0o700)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return Config(**given), size


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= MAX_REPLICAS:
        raise ValueError
    return number


def _replicas(text: str) -> int | str:
    return text if text == "auto" else _count(text)


if __name__ == "__main__":
    sys.exit(main())
