"""`decode_depth` as one persistent kernel: a private CUDA op that callers may try."""

import inspect
from typing import Any

import torch
from torch import Tensor

from voxkern import ops
from voxkern.backend import backend_for, has_kernel, implementation, on_one_device

PERSISTENT_DEPTH = "_decode_depth_persistent"
"""The op's name. It takes the arguments of `voxkern.ops.decode_depth` and draws the same codes."""


def decode_depth_persistent(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`voxkern.ops.decode_depth` with all positions in one kernel, where the native backend has it.

    The kernel takes at most 8 rows, in bfloat16; other calls run `decode_depth` unchanged. If its
    blocks wait for each other in vain (they are not all resident), it gives up: codes that it has
    not drawn by then are -1.

    Args:
        hidden, args, kwargs: the arguments of `decode_depth`.

    Returns:
        `[B, K]` int64, as `decode_depth`.
    """
    device = hidden.device.type
    native = backend_for(device, "decode_depth") == "native"
    if native and has_kernel(torch.ops.voxkern, PERSISTENT_DEPTH, device.upper()):
        return implementation(PERSISTENT_DEPTH, "native")(hidden, *args, **kwargs)
    return ops.decode_depth(hidden, *args, **kwargs)


if hasattr(torch.ops.voxkern, PERSISTENT_DEPTH):  # an older extension may lack it
    fake = on_one_device(inspect.unwrap(ops.decode_depth))
    torch.library.register_fake(f"voxkern::{PERSISTENT_DEPTH}", fake)
