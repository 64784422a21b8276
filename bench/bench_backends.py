"""Which backends are measured beside each other: `bench/run.py --backend`."""

from collections.abc import Callable, Sequence
from functools import partial

from voxkern.backend import force, why_missing

TORCH = "torch"
"""In a list of backends: what one would write without this library."""
PERSISTENT = "persistent"
"""In a list of backends: the native one, with the depth decoder as one kernel."""


def chosen(names: str, device: str) -> list[str]:
    """The backends of a list with commas, all of which run on `device`.

    Raises:
        ValueError: one does not, with the reason; or the first is none.
    """
    backends = list(dict.fromkeys(names.split(",")))
    for name in backends:
        if name != TORCH and (reason := why_missing(served_by(name), device)):
            raise ValueError(f"{name}: {reason}")
    if backends[0] in (TORCH, PERSISTENT):
        raise ValueError(
            f"{names}: the first is measured, and {backends[0]} is there to compare with"
        )
    return backends


def served_by(name: str | None) -> str | None:
    """The backend behind a name of a list."""
    return "native" if name == PERSISTENT else name


def on(backend: str | None, call: Callable) -> Callable:
    """`call` with its ops on that backend; None is whichever serves. `PERSISTENT` is the native
    one, and an argument `persistent` of the call."""
    if backend is None:
        return call
    if backend == PERSISTENT:
        backend, call = served_by(backend), partial(call, persistent=True)

    def run(*args, **kwargs):
        before = force(backend)
        try:
            return call(*args, **kwargs)
        finally:
            force(before)

    return run


def compared(backends: Sequence[str | None]) -> list[str]:
    """The columns of all but the first: a time, and what it is to the first's."""
    return [column for name in backends[1:] for column in (f"{name} ms", f"x {name}")]


def comparison(ms: Sequence[float | None]) -> list[float | None]:
    """Their cells, None where there is no time."""
    return [cell for theirs in ms[1:] for cell in (theirs, theirs and theirs / ms[0])]
