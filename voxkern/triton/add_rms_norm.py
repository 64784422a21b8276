from torch import Tensor

from voxkern.triton.rms_norm import normalise


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return normalise(x, residual, weight, eps)
