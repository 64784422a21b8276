"""What is measured of an op."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        shape: for the reader.
        inputs: makes one set of inputs; sets beyond the first are made to defeat the caches.
        ours, torch: called with one set; torch is None if there is nothing to compare with.
        num_bytes: read and written at least once, per call.
        flops: operations per call.
        multiplied: what the operations are on, if not the dtype of the run.
        persistent: `ours` as one persistent kernel, None if there is none at this shape.
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
