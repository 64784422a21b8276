"""The backends that one run compares: `bench/run.py --backend`."""

from collections.abc import Callable, Sequence
from functools import partial

from voxkern.backend import force, why_missing

TORCH = "torch"
"""List entry for plain torch: the code one would write without this library."""
PERSISTENT = "persistent"
"""List entry for the native backend with the depth decoder as one persistent kernel."""


def parse_backends(names: str, device: str) -> list[str]:
    """Parses a comma-separated list of backends and checks that all of them run on `device`.

    Raises:
        ValueError: a backend does not run, with the reason; or the first entry is not a backend.
    """
    backends = list(dict.fromkeys(names.split(",")))
    for name in backends:
        if name != TORCH and (reason := why_missing(serving_backend(name), device)):
            raise ValueError(f"{name}: {reason}")
    if backends[0] in (TORCH, PERSISTENT):
        raise ValueError(
            f"{names}: the first is measured; {backends[0]} can only be compared with it"
        )
    return backends


def serving_backend(name: str | None) -> str | None:
    """The backend that serves a list entry."""
    return "native" if name == PERSISTENT else name


def bind_backend(backend: str | None, call: Callable) -> Callable:
    """`call` with its ops on that backend; None leaves the default choice. `PERSISTENT` selects
    the native backend and passes `persistent=True` to the call."""
    if backend is None:
        return call
    if backend == PERSISTENT:
        backend, call = serving_backend(backend), partial(call, persistent=True)

    def run(*args, **kwargs):
        before = force(backend)
        try:
            return call(*args, **kwargs)
        finally:
            force(before)

    return run


def comparison_columns(backends: Sequence[str | None]) -> list[str]:
    """Column headings of all backends but the first: time, and its ratio to the first one's."""
    return [column for name in backends[1:] for column in (f"{name} ms", f"x {name}")]


def comparison_cells(ms: Sequence[float | None]) -> list[float | None]:
    """The cells for `comparison_columns`; None where nothing was measured."""
    return [cell for theirs in ms[1:] for cell in (theirs, theirs and theirs / ms[0])]
