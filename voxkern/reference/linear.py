import torch
from torch import Tensor

from voxkern.quantize import format_of, integers, quantize_rows


def linear(x: Tensor, weight: Tensor) -> Tensor:
    if format_of(weight) == "none":
        # Row by row, each a copy at an aligned address: the order of a sum in torch's GEMM depends
        # on the number of rows and on their alignment.
        rows, matrix = x.float().reshape(x.shape[:-1].numel(), x.shape[-1]), weight.float()
        out = rows.new_empty(len(rows), len(matrix))
        for row, to in zip(rows, out, strict=True):
            to.copy_(matrix @ row.clone())
        return out.to(x.dtype).view(*x.shape[:-1], len(matrix))
    values, group_scales, row_scales = integers(weight)
    x_values, x_scales = quantize_rows(x)
    groups = values.float().unflatten(-1, x_values.shape[-2:])
    # Sums of integers below 2^24 are exact in float32, in any order.
    dots = torch.einsum("...gc,ngc->...gn", x_values, groups)
    out = x_scales.new_zeros(*x.shape[:-1], len(values))
    for g in range(len(groups[0]) if len(groups) else 0):
        out += dots[..., g, :] * (group_scales[:, g] * x_scales[..., g, None])
    out *= row_scales[:, 0]
    return out.to(x.dtype)


def project(x: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    """`linear` without the padding rows of a packed weight's last block."""
    return linear(x, weight)[..., :num_rows]


def project_float(x: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    """`project` of float32 x; for a bfloat16 weight, x is rounded to bfloat16 first."""
    if weight.dtype == torch.bfloat16:
        x = x.to(torch.bfloat16).float()
        weight = weight.float()
    return project(x, weight, num_rows)
