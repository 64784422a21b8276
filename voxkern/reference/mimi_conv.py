import torch
import torch.nn.functional as F
from torch import Tensor

from voxkern.quantize import unblock_rows
from voxkern.reference.linear import project_float


def mimi_conv(
    x: Tensor,
    past: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    dilation: int,
    elu: bool,
) -> Tensor:
    steps, context = x.shape[1], past.shape[1]
    x = torch.cat((past, x), 1)
    taps = [x[:, i : i + steps] for i in range(0, context + 1, dilation)]
    windows = torch.cat(taps, -1)
    out = project_float(F.elu(windows) if elu else windows, unblock_rows(weight), len(bias)) + bias
    past.copy_(x[:, steps:])
    return out if add is None else out + add
