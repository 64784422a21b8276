"""A bound on the memory that a block may take, and refusals within it."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def memory_limit(more_bytes: int = 1 << 30) -> Iterator[None]:
    """Allocations fail (MemoryError, or torch's RuntimeError) beyond `more_bytes` more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refusal(call, *arguments, **keywords) -> str:
    """The one-line message of the ValueError that a call raises, in little memory."""
    with memory_limit(), pytest.raises(ValueError) as error:  # noqa: PT011 (callers check it)
        call(*arguments, **keywords)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)
