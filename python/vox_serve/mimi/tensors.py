"""Named tensors, read with their shapes checked."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from voxkern.quantize import GROUP, pack

PRECISIONS = ("float32", "bfloat16", "int8")


class TensorReader:
    """Hands out a checkpoint's tensors by name, as float32, and rounds what is made of them.

    Args:
        tensors: by name.
        precision: one of `PRECISIONS`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], precision: str = "float32") -> None:
        self._tensors, self._precision = tensors, precision
        self._read: set[str] = set()
        self.device = next((x.device for x in tensors.values()), torch.device("cpu"))

    def at(self, precision: str) -> "TensorReader":
        """A reader of the same tensors that rounds to another precision."""
        other = TensorReader(self._tensors, precision)
        other._read = self._read
        return other

    def convolution(self, weight: Tensor) -> Tensor:
        """A convolution's taps `[N, J, C]`: bfloat16 where the precision is less than float32.

        Columns that do not make pairs stay as they are.
        """
        if self._precision == "float32" or weight.shape[1] * weight.shape[2] % 2:
            return weight
        return weight.to(torch.bfloat16)

    def matrices(self, weight: Tensor) -> Tensor:
        """A transformer's matrices `[L, N, K]` at the precision; no int8 if K cannot be packed."""
        if self._precision == "int8" and weight.shape[-1] % GROUP == 0:
            return pack(weight, "int8")
        return weight if self._precision == "float32" else weight.to(torch.bfloat16)

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name.

        Raises:
            ValueError: it is missing or has another shape; the message names it.
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
        """Check that no layer of a kind that was read remains unread.

        A config with too few layers would otherwise load, and make noise. Codebooks may remain:
        every prefix of them is a codec.

        Raises:
            ValueError: one remains; the message names it.
        """
        kinds = {re.sub(r"\d+", "#", name) for name in self._read}
        for name in self._tensors:
            read = name in self._read or name.startswith("quantizer.")
            if not read and re.sub(r"\d+", "#", name) in kinds:
                raise ValueError(f"Mimi checkpoint: tensor {name} is beyond the config's layers")
