"""Named tensors, read with their shapes checked."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from voxkern.quantize import GROUP, pack

PRECISIONS = ("float32", "bfloat16", "int8")


class TensorReader:
    """Reads a checkpoint's tensors by name, as float32, and rounds the weights built from them.

    Args:
        tensors: by name.
        precision: one of `PRECISIONS`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], precision: str = "float32") -> None:
        self._tensors, self._precision = tensors, precision
        self._read: set[str] = set()
        self.device = next((x.device for x in tensors.values()), torch.device("cpu"))

    def at(self, precision: str) -> "TensorReader":
        """A reader of the same tensors with another precision."""
        other = TensorReader(self._tensors, precision)
        other._read = self._read
        return other

    def convolution(self, weight: Tensor) -> Tensor:
        """Round a convolution's taps `[N, J, C]` to bfloat16 unless the precision is float32.

        Taps with an odd number of columns stay float32.
        """
        if self._precision == "float32" or weight.shape[1] * weight.shape[2] % 2:
            return weight
        return weight.to(torch.bfloat16)

    def matrices(self, weight: Tensor) -> Tensor:
        """Round a transformer's matrices `[L, N, K]`; bfloat16 for int8 if K cannot be packed."""
        if self._precision == "int8" and weight.shape[-1] % GROUP == 0:
            return pack(weight, "int8")
        return weight if self._precision == "float32" else weight.to(torch.bfloat16)

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Read the tensor of that name.

        Raises:
            ValueError: the tensor is missing or has another shape; the message names it.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ValueError(f"Mimi checkpoint: tensor {name} is missing")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"Mimi checkpoint: tensor {name} is {list(tensor.shape)}, expected {list(shape)}"
            )
        self._read.add(name)
        return tensor.to(torch.float32).contiguous()

    def refuse_leftover_layers(self) -> None:
        """Check that the layers of each kind were either all read or all left.

        Otherwise a config with too few layers would load and produce noise. Unread codebooks are
        allowed: any number of the first ones is a codec.

        Raises:
            ValueError: a layer was left; the message names it.
        """
        kinds = {re.sub(r"\d+", "#", name) for name in self._read}
        for name in self._tensors:
            read = name in self._read or name.startswith("quantizer.")
            if not read and re.sub(r"\d+", "#", name) in kinds:
                raise ValueError(f"Mimi checkpoint: tensor {name} is beyond the config's layers")
