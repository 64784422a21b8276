"""Runs a scenario against a `Runner` of a fake engine."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fake_engine import TIMEOUT_S, FakeEngine
from vox_serve.job import Job
from vox_serve.runner import Runner


def run_with(
    engine: FakeEngine,
    scenario: Callable[[Runner], Awaitable[Any]],
    max_jobs: int = 8,
    started: bool = True,
    **limits: Any,
) -> Any:
    """The result of `scenario(runner)` on an event loop, with a time limit.

    Args:
        engine: the runner's.
        scenario: what happens.
        max_jobs, limits: the runner's.
        started: start the runner before the scenario.
    """

    async def main() -> Any:
        runner = Runner(engine, max_jobs, **limits)
        if started:
            runner.start()
        try:
            return await asyncio.wait_for(scenario(runner), TIMEOUT_S)
        finally:
            await runner.stop()

    return asyncio.run(main())


async def read_job(job: Job) -> bytes:
    """All of a job's PCM, read as it is made."""
    with job:
        return b"".join([chunk async for chunk in job])
