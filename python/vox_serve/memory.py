"""The memory of this machine."""

import os
from pathlib import Path

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # version 2 and 1


def memory_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this machine has, or that its container may use.

    Args:
        cgroups: where the limits of the container are mounted.
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _CGROUP_LIMITS:
        try:
            text = (cgroups / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # otherwise "max"
            found.append(int(text))
    return min(found)
