"""Which backends are measured beside each other: `bench/run.py --backend`."""

from collections.abc import Callable, Sequence

from voxkern.backend import force, why_missing

TORCH = "torch"
"""In a list of backends: what one would write without this library."""


def chosen(names: str, device: str) -> list[str]:
    """The backends of a list with commas, all of which run on `device`.

    Raises:
        ValueError: one does not, with the reason; or plain torch is the first.
    """
    backends = list(dict.fromkeys(names.split(",")))
    for name in backends:
        if name != TORCH and (reason := why_missing(name, device)):
            raise ValueError(f"{name}: {reason}")
    if backends[0] == TORCH:
        raise ValueError(f"{names}: the first is measured, and {TORCH} is there to compare with")
    return backends


def on(backend: str | None, call: Callable) -> Callable:
    """`call` with its ops on that backend; None is whichever serves."""
    if backend is None:
        return call

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
