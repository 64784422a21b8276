"""The number of replicas, by delays and refusals that their listeners would notice.

Ray Serve calls `scale` a few times a second with what the replicas have reported of late, waits
for `--up_s` or `--down_s` before it follows, and drains a replica before it ends it.
"""

import math
from collections.abc import Mapping
from typing import Any

FULL = 0.8
"""More replicas are needed beyond this share of the streams that those there can speak."""

ROOMY = 0.5
"""Fewer replicas would do if they were no fuller than this."""

LATE_S = 0.2
"""Predicted wait of a new stream from which on more replicas are needed."""


def wanted(
    number: int,
    capacity: Mapping[Any, float],
    busy: Mapping[Any, float],
    wait_s: Mapping[Any, float],
    refused: Mapping[Any, float],
) -> int:
    """The replicas that are needed.

    Args:
        number: those that there are, or will be soon.
        capacity: streams that each can speak at once.
        busy: requests that each speaks, or that wait there.
        wait_s: predicted wait of one more stream.
        refused: requests that each has refused lately.
    """
    if not capacity or min(capacity.values()) <= 0:
        return number
    each = sum(capacity.values()) / len(capacity)
    total = sum(busy.values())
    least = math.ceil(total / (FULL * each))
    if len(capacity) < number:  # some are starting: wait and see
        return max(number, least)
    if any(refused.values()) or min(wait_s.values(), default=0.0) > LATE_S:
        return max(number + 1, least)
    if least > number:
        return least
    return number - 1 if number > 1 and total <= ROOMY * each * (number - 1) else number


def scale(context: Any) -> tuple[int, dict[str, Any]]:
    """The policy as Ray Serve calls it, with an `AutoscalingContext`."""
    metrics = context.aggregated_metrics or {}
    names = ("capacity", "busy", "wait_s", "refused")
    number = context.target_num_replicas
    return wanted(number, *(metrics.get(name, {}) for name in names)), {}
