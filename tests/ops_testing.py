"""What the op tests share: where to run, how near to the reference a result must be."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Target:
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    def why_missing(self) -> str | None:
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return why_missing(self.backend, self.device)

    def run(self, name: str, *args):
        """Call op `name` here; its CPU arguments, mutated ones too, and result are on the CPU."""
        moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in args]
        result = implementation(name, self.backend)(*moved)
        if self.device != "cpu":
            for mine, theirs in zip(args, moved, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(theirs)
        if isinstance(result, tuple | list):
            return [part.cpu() for part in result]
        return result.cpu() if isinstance(result, Tensor) else result


ALL_TARGETS = [Target(b, d) for d in ("cpu", "cuda") for b in ("native", "triton")]


def targets() -> list[Target]:
    """The targets that this machine has; pytest's header says why it lacks the others."""
    return [target for target in ALL_TARGETS if target.why_missing() is None]


def reference(name: str, *args):
    """Op `name` by its specification."""
    return implementation(name, "reference")(*args)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **TOLERANCE[expected.dtype])


def opcheck(name: str, *args) -> None:
    """Schema, mutation and fake kernel of the native op agree with what it does."""
    torch.library.opcheck(getattr(torch.ops.voxkern, name).default, args)
