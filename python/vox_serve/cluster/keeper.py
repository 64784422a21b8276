"""The directory of conversations in a process of its own: a Ray actor that Ray starts again."""

import asyncio
from collections.abc import Sequence
from typing import Any

from vox_serve.cluster.directory import Claim, Directory, Key, State

ACTOR = "voxkern-conversations"
NAMESPACE = "serve"
CALL_TIMEOUT_S = 5.0


class RemoteKeeper:
    """The `Keeper` of a replica: the cluster's one actor, started by the first that asks.

    Args:
        max_number, idle_s: see `Directory`.
    """

    def __init__(self, max_number: int, idle_s: float) -> None:
        import ray

        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Actor)
        self._actor = actor.options(
            name=ACTOR, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
        ).remote(max_number, idle_s)

    async def claim(
        self, key: Key, asker: Sequence[Any], instead_of: Sequence[Any] | None
    ) -> Claim:
        found: Claim = await self._actor.claim.remote(key, asker, instead_of)
        return found

    async def save(self, key: Key, owner: Sequence[Any], state: State | None) -> bool:
        return bool(await self._actor.save.remote(key, owner, state))

    async def epoch(self) -> str:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return str(await self._actor.epoch.remote())


class _Actor:
    def __init__(self, max_number: int, idle_s: float) -> None:
        self._directory = Directory(max_number, idle_s)

    def claim(self, key: Key, asker: Sequence[Any], instead_of: Sequence[Any] | None) -> Claim:
        return self._directory.claim(key, asker, instead_of)

    def save(self, key: Key, owner: Sequence[Any], state: State | None) -> bool:
        return self._directory.save(key, owner, state)

    def epoch(self) -> str:
        return self._directory.epoch


def stop_keeper() -> None:
    """End the actor, if there is one."""
    import ray

    try:
        ray.kill(ray.get_actor(ACTOR, NAMESPACE), no_restart=True)
    except ValueError:
        return
