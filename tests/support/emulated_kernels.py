"""Engines whose ops run kernels of a GPU on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ops_testing import Target
from voxkern import backend


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Within the block, ops with CUDA kernels run these, compiled for the host (tests/simt).

    Skips the test if they are not built.
    """
    simt, native = Target("simt", "cpu"), backend.implementation
    if reason := simt.why_missing():
        pytest.skip(reason)

    def implementation(name: str, backend: str):
        if simt.why_missing(name):
            return native(name, backend)
        return getattr(torch.ops.voxkern_simt, name).default

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "implementation", implementation)
        yield


@contextmanager
def interpreted_transformers() -> Iterator[None]:
    """Within the block, the transformers' ops run Triton's kernels, and the codec's its own."""
    native = backend.implementation

    def implementation(name: str, chosen: str):
        return native(name, chosen if name.startswith("mimi_") else "triton")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "implementation", implementation)
        yield
