"""What the op tests share: where to run, how near to the reference a result must be."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from voxkern.backend import implementation, why_missing

DTYPES = (torch.float32, torch.bfloat16)

# Reference and kernel accumulate in float32 in different orders, then round once: a few units in
# the last place of float32, one of bfloat16 (2^-8 relative, where the two fall on either side of
# a rounding boundary). The absolute part covers sums that cancel.
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
}


# The CUDA kernels, built for the host (tests/simt): ops of the namespace voxkern_simt.
SIMT_LIBRARY = Path(
    os.environ.get("VOXKERN_SIMT_LIBRARY")
    or Path(__file__).parents[1] / "build" / "simt" / "tests" / "simt" / "voxkern_simt.so"
).absolute()
if SIMT_LIBRARY.exists():
    torch.ops.load_library(str(SIMT_LIBRARY))


@dataclass(frozen=True)
class Target:
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    def why_missing(self, op: str | None = None) -> str | None:
        """None if op `op`, or any, can run here, else the reason."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.backend != "simt":
            return why_missing(self.backend, self.device, op)
        if not SIMT_LIBRARY.exists():
            return "not built: make simt"
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        if op and not has_kernel(f"voxkern_simt::{op}", "CPU"):
            return f"{op} has no CUDA kernel"
        return None

    def few(self, count: int) -> int:
        """`count`, or a quarter of it where every thread of a kernel is a fiber."""
        return count // 4 if self.backend == "simt" else count

    def run(self, name: str, *args):
        """Call op `name` here; its CPU arguments, mutated ones too, and result are on the CPU."""
        moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in args]
        if self.backend == "simt":
            function = getattr(torch.ops.voxkern_simt, name).default
        else:
            function = implementation(name, self.backend)
        try:
            result = function(*moved)
        except RuntimeError as error:
            if "no CUDA kernel takes yet" in str(error):
                pytest.skip(str(error))
            raise
        if self.device != "cpu":
            for mine, theirs in zip(args, moved, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(theirs)
        return result.cpu() if isinstance(result, Tensor) else result


ALL_TARGETS = [
    *(Target(b, d) for d in ("cpu", "cuda") for b in ("native", "triton")),
    Target("simt", "cpu"),
]


def targets(op: str | None = None) -> list[Target]:
    """Where `op` can run on this machine; pytest's header says why it lacks other targets."""
    return [target for target in ALL_TARGETS if target.why_missing(op) is None]


def reference(name: str, *args):
    """Op `name` by its specification."""
    return implementation(name, "reference")(*args)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **TOLERANCE[expected.dtype])


def opcheck(name: str, *args) -> None:
    """Schema, mutation and fake kernel of the native op agree with what it does."""
    torch.library.opcheck(getattr(torch.ops.voxkern, name).default, args)
