"""Named tensors, read with their shapes checked."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor


class TensorReader:
    """Hands out a checkpoint's tensors by name, as float32.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._read: set[str] = set()

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
