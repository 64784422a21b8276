"""Counts the audio that waits for its readers, and names who must give some up."""

from vox_serve.job import Job


class UnreadAudio:
    """Unread bytes of all jobs. Only the event loop uses it.

    Args:
        max_bytes: limit for all clients together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._jobs: dict[str, dict[Job, None]] = {}  # by client, those that hold some

    def count(self, job: Job, num_bytes: int) -> Job | None:
        """Count bytes that a job gained or, if negative, lost.

        Returns:
            The job to drop when the limit is exceeded: the one with the most unread audio of the
            client with the most. So a client that reads loses nothing to one that does not.
        """
        self.num_bytes += num_bytes
        if job.unread_bytes:
            self._jobs.setdefault(job.client, {})[job] = None
        elif job in (jobs := self._jobs.get(job.client, {})):
            del jobs[job]
            if not jobs:
                del self._jobs[job.client]
        if num_bytes <= 0 or self.num_bytes <= self.max_bytes:
            return None
        largest = max(self._jobs.values(), key=lambda jobs: sum(j.unread_bytes for j in jobs))
        return max(largest, key=lambda job: job.unread_bytes)
