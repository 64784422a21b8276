"""A bounded rate of something that each client does, with a burst: without a clock."""

MAX_DELAY_S = 10.0
MAX_CLIENTS = 4096
"""Clients that are remembered; beyond that, the one that acted longest ago is not."""


class ClientPace:
    """When each client may go on after it did something, by the caller's clock.

    Args:
        per_s: acts a second of one client; 0 for no limit.
        burst: acts at once of a client that did nothing for a while.
    """

    def __init__(self, per_s: float, burst: int) -> None:
        self.per_s = per_s
        self.burst = burst
        # The time at which all acts of a client are forgotten, the oldest last act first.
        self._free_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._free_at)

    def count(self, client: str, now: float) -> float:
        """Count an act of a client; return `delay_s`."""
        if not self.per_s:
            return 0.0
        burst_s = self.burst / self.per_s
        free_at = max(self._free_at.pop(client, now), now) + 1 / self.per_s
        self._free_at[client] = min(free_at, now + burst_s + MAX_DELAY_S)
        oldest = next(iter(self._free_at))
        if len(self) > MAX_CLIENTS or self._free_at[oldest] <= now:
            del self._free_at[oldest]
        return self.delay_s(client, now)

    def delay_s(self, client: str, now: float) -> float:
        """Seconds until a client has done no more than its rate allows, at most `MAX_DELAY_S`."""
        if not self.per_s:
            return 0.0
        excess_s = self._free_at.get(client, now) - now - self.burst / self.per_s
        return min(max(0.0, excess_s), MAX_DELAY_S)
