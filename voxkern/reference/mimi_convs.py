import torch
from torch import Tensor

from voxkern.reference.mimi_conv import mimi_conv


def mimi_convs(
    x: Tensor,
    fresh: Tensor,
    past: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    plan: list[int],
) -> Tensor:
    """A composition of `mimi_conv` calls."""
    values = [x]
    for i, left in enumerate(past):
        source, add, dilation, elu, block_in, block_out, replicate = plan[7 * i : 7 * i + 7]
        x = values[source]
        if replicate:
            left.copy_(torch.where(fresh[:, None, None], x[:, :1].repeat(1, 1, block_in), left))
        x = x.unflatten(1, (-1, block_in)).flatten(2)
        added = None if add < 0 else values[add]
        x = mimi_conv(x, left, weights[i], biases[i], added, dilation, bool(elu))
        values.append(x.unflatten(2, (block_out, -1)).flatten(1, 2))
    return values[-1]
