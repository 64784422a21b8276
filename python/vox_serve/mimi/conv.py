"""The codec's building block, a causal convolution over blocks of samples, and chains of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.tensors import TensorReader
from voxkern import ops
from voxkern.quantize import block_rows


class CausalConv:
    """A causal convolution over blocks of samples, optionally after an ELU.

    All convolutions of SEANet have this form. With kernel `2 s` and stride `s`, a strided
    convolution has two taps over blocks of `s` samples; a transposed one has two taps and turns
    each input into a block of `s` samples. So the state of a stream is always the last `context`
    input blocks.

    Args:
        taps: `[Cout, J, Cin]`, the oldest tap first.
        bias: `[Cout]`.
        dilation: distance between taps, in blocks.
        block_in: samples per input block (the stride).
        block_out: samples per output block (the stride of a transposed convolution).
        elu: apply ELU to the input.
        replicate: pad the start of a stream with its first sample instead of zeros.
    """

    def __init__(
        self,
        taps: Tensor,
        bias: Tensor,
        *,
        dilation: int = 1,
        block_in: int = 1,
        block_out: int = 1,
        elu: bool = False,
        replicate: bool = False,
    ) -> None:
        num_taps, self.width = taps.shape[1:]
        self.weight, self.bias = block_rows(taps.flatten(1)), bias.contiguous()
        self.dilation, self.block_in, self.block_out = dilation, block_in, block_out
        self.context = (num_taps - 1) * dilation
        self.elu, self.replicate = elu, replicate

    @classmethod
    def strided(
        cls,
        tensors: TensorReader,
        name: str,
        shape: tuple[int, int, int],
        *,
        bias: bool = True,
        stride: int = 1,
        **how: Any,
    ) -> "CausalConv":
        """Build from a Conv1d's weight, `shape` = `[Cout, Cin, kernel]`; stride divides kernel."""
        weight = tensors(f"{name}.weight", *shape)
        taps = weight.unflatten(2, (-1, stride)).permute(0, 2, 3, 1).flatten(2)
        offset = tensors(f"{name}.bias", shape[0]) if bias else weight.new_zeros(shape[0])
        return cls(tensors.convolution(taps), offset, block_in=stride, **how)

    @classmethod
    def transposed(
        cls,
        tensors: TensorReader,
        name: str,
        channels: tuple[int, int],
        stride: int,
        *,
        bias: bool = True,
        groups: int = 1,
        **how: Any,
    ) -> "CausalConv":
        """Build from a ConvTranspose1d's weight, `[Cin, Cout / groups, 2 * stride]`."""
        c_in, c_out = channels
        weight = tensors(f"{name}.weight", c_in, c_out // groups, 2 * stride)
        if groups > 1:
            blocks = weight.unflatten(0, (groups, -1)).unbind(3)
            weight = torch.stack([torch.block_diag(*tap) for tap in blocks], dim=2)
        taps = weight.unflatten(2, (2, stride)).flip(2).permute(3, 1, 2, 0).flatten(0, 1)
        offset = tensors(f"{name}.bias", c_out) if bias else weight.new_zeros(c_out)
        return cls(tensors.convolution(taps), offset.repeat(stride), block_out=stride, **how)


class DepthwiseUpsample:
    """A depthwise transposed convolution of kernel `2 s` and stride `s`, without bias.

    Args:
        weight: `[C, 1, 2 s]`, as in a ConvTranspose1d with C groups.
    """

    def __init__(self, weight: Tensor) -> None:
        self.contexts = [(1, weight.shape[0])]
        self.new, self.old = weight.squeeze(1).t().contiguous().chunk(2)  # [s, C]

    def __call__(self, x: Tensor, fresh: Tensor, past: Sequence[Tensor]) -> Tensor:
        """As `Chain.__call__`."""
        x = torch.cat((*past, x), 1).unsqueeze(2)
        past[0].copy_(x[:, -1])
        return torch.addcmul(x[:, :-1] * self.old, x[:, 1:], self.new).flatten(1, 2)


class ResidualUnit:
    """`x + conv1(ELU(convk(ELU(x))))`, or with a 1x1 convolution of the first `x`.

    Args:
        config: the codec's sizes.
        tensors, name: reader of the weights, and their prefix.
        channels: C.
        depth: index among the residual units of its resolution; determines the dilation.
    """

    def __init__(
        self, config: MimiConfig, tensors: TensorReader, name: str, channels: int, depth: int
    ) -> None:
        hidden = channels // config.compress
        self.narrow = CausalConv.strided(
            tensors,
            f"{name}.block.1.conv",
            (hidden, channels, config.residual_kernel_size),
            dilation=config.dilation_growth_rate**depth,
            elu=True,
            replicate=config.pad_mode == "replicate",
        )
        wide = (channels, hidden, 1)
        self.widen = CausalConv.strided(tensors, f"{name}.block.3.conv", wide, elu=True)
        self.shortcut = None
        if config.use_conv_shortcut:
            square = (channels, channels, 1)
            self.shortcut = CausalConv.strided(tensors, f"{name}.shortcut.conv", square)


class Chain:
    """A sequence of convolutions and residual units.

    Args:
        layers: the layers, in order.

    Attributes:
        convs: all convolutions, in the order in which they run.
        contexts: `(blocks, width)` of each convolution's state in a stream.
    """

    def __init__(self, layers: Sequence[CausalConv | ResidualUnit]) -> None:
        self.convs: list[CausalConv] = []
        self._plan: list[int] = []
        last = 0
        for layer in layers:
            if isinstance(layer, CausalConv):
                last = self._add(layer, last)
            else:
                kept = last if layer.shortcut is None else self._add(layer.shortcut, last)
                last = self._add(layer.widen, self._add(layer.narrow, last), kept)
        self.contexts = [(conv.context, conv.width) for conv in self.convs]
        self._weights = [conv.weight for conv in self.convs]
        self._biases = [conv.bias for conv in self.convs]

    def __call__(self, x: Tensor, fresh: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Run a chunk.

        Args:
            x: `[B, T, C]`, T a multiple of all strides.
            fresh: `[B]` bool, True for streams that begin with this chunk.
            past: `[B, blocks, width]` for each of `contexts`, updated in place.

        Returns:
            `[B, T', C']`, contiguous.
        """
        return ops.mimi_convs(x, fresh, list(past), self._weights, self._biases, self._plan)

    def _add(self, conv: CausalConv, source: int, added: int = -1) -> int:
        """Append a convolution; returns its output's index among the values of `mimi_convs`."""
        self.convs.append(conv)
        self._plan += [source, added, conv.dilation, int(conv.elu)]
        self._plan += [conv.block_in, conv.block_out, int(conv.replicate)]
        return len(self.convs)
