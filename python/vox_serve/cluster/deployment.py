"""The Ray Serve application: replicas of the engine, and an ingress for Ray's own HTTP proxy."""

import os
from dataclasses import dataclass
from typing import Any

from vox_serve.config import Config

APP_NAME = "voxkern"
DEPLOYMENT = "Replica"

REPORT_PERIOD_S = 0.5
STOP_MARGIN_S = 10.0
HEALTH_PERIOD_S = 2.0

MAX_ONGOING = 100_000
"""Requests that Ray Serve lets into a replica: the replica itself knows how many it can take."""


@dataclass(frozen=True)
class Size:
    """The number of replicas.

    Attributes:
        least, most: replicas; equal for a fixed number.
        up_s: time that more are needed before one is added.
        down_s: time that fewer would do before one is taken away.
    """

    least: int
    most: int
    up_s: float = 5.0
    down_s: float = 300.0


def given_settings(config: Config) -> dict[str, Any]:
    """The settings that are not the default, as `Config` takes them."""
    return config.model_dump(include=config.model_fields_set)


def replicas(config: Config, size: Size, host: str | None = None) -> Any:
    """The bound deployment of `Replica`.

    Args:
        config: the settings of each replica.
        size: how many there are.
        host: address at which doors reach them; None for their node's.
    """
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

    from vox_serve.cluster.replica import Replica

    number: dict[str, Any] = {"num_replicas": size.least}
    if size.most > size.least:
        policy = AutoscalingPolicy(policy_function="vox_serve.cluster.scaling:scale")
        scaling = AutoscalingConfig(
            min_replicas=size.least,
            max_replicas=size.most,
            upscale_delay_s=size.up_s,
            downscale_delay_s=size.down_s,
            policy=policy,
        )
        number = {"autoscaling_config": scaling}
    deployment = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=config.drain_s + STOP_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_PERIOD_S,
        request_router_config=RequestRouterConfig(
            request_router_class="vox_serve.cluster.router:WorkRouter",
            request_routing_stats_period_s=REPORT_PERIOD_S,
        ),
        ray_actor_options=_resources(config),
        **number,
    )
    return deployment.bind(given_settings(config), host)


def _resources(config: Config) -> dict[str, Any]:
    """The resources that Ray reserves for a replica: a GPU if there are any, else processors for
    its threads."""
    if uses_gpu(config):
        return {"num_gpus": 1, "num_cpus": 1}
    return {"num_cpus": config.num_threads or 1}


def uses_gpu(config: Config) -> bool:
    """True if each replica takes a GPU."""
    import ray

    if config.device == "auto":
        return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1
    return config.device == "cuda"


def app(args: dict[str, Any]) -> Any:
    """The application for `serve run vox_serve.cluster:app` and Serve's configuration files.

    Ray's own proxy takes the requests and hands them to `Ingress`, which is a `Door`.

    Args:
        args: settings by name, as text or as values; and `replicas`, a number or `auto`,
            `max_replicas`, and the number of `doors`, processes that pass requests on. Settings
            that are not given come from the environment.

    Raises:
        ConfigError: a setting is unknown or invalid.
    """
    from ray import serve

    from vox_serve.cluster.ingress import Ingress
    from vox_serve.config import parse_value

    given = dict(args)
    least = given.pop("replicas", os.environ.get("VOX_SERVE_REPLICAS", "1"))
    most, doors = int(given.pop("max_replicas", 0) or 0), int(given.pop("doors", 1))
    size = Size(1, max(most, 1)) if least == "auto" else Size(int(least), max(most, int(least)))
    for name, value in given.items():
        if isinstance(value, str) and name in Config.model_fields:
            given[name] = parse_value(name, value)
    config = Config(**given)
    ingress = serve.deployment(Ingress, name="Ingress", max_ongoing_requests=MAX_ONGOING)
    return ingress.options(num_replicas=doors, ray_actor_options={"num_cpus": 0}).bind(
        replicas(config, size), given_settings(config)
    )
