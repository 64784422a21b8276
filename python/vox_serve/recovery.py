"""Finds the request that breaks the engine, after a step has failed with several.

A step's exception does not say whose it is. The requests that took part run again one at a time:
after a first failure until their first frame, so that the innocent share the engine soon; after
another one to their end. A request that fails twice alone is refused.
"""

from collections import deque
from collections.abc import Iterable

from vox_serve.job import Job

MAX_FAILURES_ALONE = 2


class Suspects:
    """Jobs that run again. Only the engine's thread uses it.

    Attributes:
        trial: the job that has the engine for itself.
    """

    def __init__(self) -> None:
        self.trial: Job | None = None
        self._untried: deque[Job] = deque()
        self._cleared: list[Job] = []

    def __bool__(self) -> bool:
        return bool(self.trial or self._untried or self._cleared)

    def accuse(self, jobs: Iterable[Job], alone: bool) -> list[Job]:
        """Count a failed step that these jobs shared; return those that must not run again.

        Args:
            jobs: those of the step that can run again.
            alone: the step had only one job.
        """
        refused = []
        for job in jobs:
            job.progress.num_failures += 1
            job.progress.num_failures_alone += alone
            if job.progress.num_failures_alone >= MAX_FAILURES_ALONE:
                refused.append(job)
            elif self.trial is job:
                self._untried.appendleft(job)
            else:
                self._untried.append(job)
        self.trial = None
        return refused

    def next_jobs(self) -> list[Job]:
        """The jobs to start now: the next suspect; after the last one, all that were cleared."""
        if self.trial is not None:
            return []
        while self._untried:
            job = self._untried.popleft()
            if not job.closed:
                self.trial = job
                return [job]
        cleared, self._cleared = self._cleared, []
        return [job for job in cleared if not job.closed]

    def passed(self, job: Job) -> bool:
        """Note a frame of a job.

        Returns:
            True if it was on trial, passed, and must leave the engine to the next suspect: it runs
            again later.
        """
        if self.trial is not job or job.progress.num_failures > 1:
            return False
        self.trial = None
        if not self._untried:
            return False
        self._cleared.append(job)
        return True

    def ended(self, job: Job) -> None:
        """Note a job's end."""
        if self.trial is job:
            self.trial = None
