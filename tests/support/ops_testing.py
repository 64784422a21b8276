"""Shared by the op tests: targets (backend and device), tolerances, checks."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from voxkern.backend import has_kernel, implementation, why_missing

DTYPES = (torch.float32, torch.bfloat16)

# Reference and kernel accumulate in float32 in different orders, then round once: they differ by a
# few ulps in float32 and by one in bfloat16 (2^-8 relative, if a rounding boundary lies between
# them). The absolute part covers sums that cancel.
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8},
}


# The CUDA kernels compiled for the host (tests/simt), as ops of the namespace voxkern_simt.
SIMT_LIBRARY = Path(
    os.environ.get("VOXKERN_SIMT_LIBRARY")
    or Path(__file__).parents[2] / "build" / "simt" / "tests" / "simt" / "voxkern_simt.so"
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
        """None if op `op` (any op if None) can run here, otherwise the reason."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.backend != "simt":
            return why_missing(self.backend, self.device, op)
        if not SIMT_LIBRARY.exists():
            return "not built: make simt"
        if op and not has_kernel(torch.ops.voxkern_simt, op, "CPU"):
            return f"{op} has no CUDA kernel"
        return None

    def few(self, count: int) -> int:
        """`count` reduced for slow targets: to a quarter where each CUDA thread is a fiber, to a
        sixteenth where Triton's interpreter runs each operation in Python."""
        if self.backend == "simt":
            return count // 4
        return -(-count // 16) if self.interpreted else count

    def at_most(self, limit: int, size: int) -> int:
        """`size`, capped at `limit` under Triton's interpreter, where each program is slow."""
        return min(limit, size) if self.interpreted else size

    @property
    def slow(self) -> bool:
        """True where each CUDA thread is a fiber, and in Triton's interpreter."""
        return self.backend == "simt" or self.interpreted

    @property
    def interpreted(self) -> bool:
        return (self.backend, self.device) == ("triton", "cpu")

    def run(self, name: str, *args):
        """Call op `name` on this target. Takes CPU arguments, updates mutated ones in place and
        returns a CPU result."""
        if self.backend == "simt":
            function = getattr(torch.ops.voxkern_simt, name).default
        else:
            function = implementation(name, self.backend)
        moved, copies = self.move(args)
        result = function(*moved)
        for here, there in copies:
            here.copy_(there)
        return result.cpu() if isinstance(result, Tensor) else result

    def move(self, args: Sequence) -> tuple[list, list[tuple[Tensor, Tensor]]]:
        """CPU arguments on the target's device, and (here, there) pairs to copy changes back."""
        if self.device == "cpu":
            return list(args), []
        return moved(args, lambda memory: memory.to(self.device))


def moved(args: Sequence, copy: Callable) -> tuple[list, list[tuple[Tensor, Tensor]]]:
    """Arguments in copied memory. Views stay views; tensors that share memory share the copy.

    So strides, offsets, alignment and overlap on a GPU are those that the test chose on the CPU.

    Args:
        args: tensors, lists of tensors, or anything else, which is passed through.
        copy: copies all bytes of a storage to other memory.

    Returns:
        The arguments, and for each storage the pair (its bytes, their copy).
    """
    pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def move(arg):
        if isinstance(arg, list | tuple):
            return [move(a) for a in arg]
        if not isinstance(arg, Tensor):
            return arg
        storage = arg.untyped_storage()
        if storage._cdata not in pairs:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            pairs[storage._cdata] = here, copy(here)
        there = pairs[storage._cdata][1]
        return torch.empty(0, dtype=arg.dtype, device=there.device).set_(
            there.untyped_storage(), arg.storage_offset(), arg.shape, arg.stride()
        )

    return [move(arg) for arg in args], list(pairs.values())


ALL_TARGETS = [
    *(Target(b, d) for d in ("cpu", "cuda") for b in ("native", "triton")),
    Target("simt", "cpu"),
]


def targets(op: str | None = None) -> list[Target]:
    """Targets that can run `op` on this machine. pytest's header says why the others cannot."""
    return [target for target in ALL_TARGETS if target.why_missing(op) is None]


def reference(name: str, *args):
    """Result of op `name`'s reference implementation."""
    return implementation(name, "reference")(*args)


def end_if_gpu_is_broken(test: str) -> None:
    """End the process if a kernel's fault has left CUDA unusable: every later test would fail for
    the fault of this one. pytest-xdist then reports this test and continues in a new process."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{test} left the GPU unusable: {error}", file=sys.__stderr__, flush=True)
        os._exit(1)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **TOLERANCE[expected.dtype])


def opcheck(name: str, *args) -> None:
    """Check the native op's schema, mutations and fake kernel against its behaviour."""
    for target in targets(name):
        if target.backend == "native":
            args_there = tuple(target.move(args)[0])
            torch.library.opcheck(getattr(torch.ops.voxkern, name).default, args_there)
