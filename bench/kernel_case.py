"""A benchmark case: one op at one shape."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: the op's name.
        shape: as printed in the table.
        inputs: makes one set of inputs; more sets than one defeat the caches.
        ours, torch: called with one set; torch is None if there is nothing to compare with.
        num_bytes: bytes that a call must read or write at least once.
        flops: operations per call.
        multiplied: operand dtype of the operations, if not the dtype of the run.
        persistent: `ours` as one persistent kernel; None if this shape has none.
    """

    op: str
    shape: str
    inputs: Callable[[], tuple]
    ours: Callable
    torch: Callable | None
    num_bytes: float
    flops: float = 0
    multiplied: torch.dtype | None = None
    persistent: Callable | None = None
