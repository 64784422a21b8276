"""The two building blocks of the codec: a matrix product, and a causal convolution made of it.

Activations are time-major, `[T, B, C]`: a step of time is one contiguous slab whatever the batch
size, so a window of a convolution is a strided view, and every layer ends in one matrix product
of `T * B` rows.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.tensors import TensorReader


class Linear:
    """`y = x W^T + bias (+ add)`, float32.

    One frame is two rows in most of the codec, so the weights' way from memory is the cost. oneDNN
    with its weights packed once reads them two to three times as fast as MKL's GEMM at 2 to 16
    rows; where torch is built without it, or off the CPU, this is `addmm`.

    Args:
        weight: `[N, K]`, float32.
        bias: `[N]` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = None if bias is None else bias.contiguous()
        self.packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 2)
        else:
            self.weight = weight.t().contiguous()

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Args: x `[M, K]`; add `[M, N]` or None. Returns `[M, N]`, contiguous."""
        if self.packed:
            op = torch.ops.mkldnn._linear_pointwise
            if add is None:
                return op(x, self.weight, self.bias, "none", [], "")
            return op.binary(x, add, self.weight, self.bias, "add")
        y = x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        return y if add is None else y.add_(add)


class CausalConv:
    """A causal convolution over blocks of samples, optionally after an ELU.

    All of SEANet's convolutions are this one. With kernel `2 s` and stride `s`, a strided
    convolution has two taps over blocks of `s` samples; a transposed one has two taps and makes a
    block of `s` samples of every input. What a stream must remember is then always the same: the
    last `context` input blocks.

    Args:
        taps: `[Cout, J, Cin]`, the oldest tap first.
        bias: `[Cout]` or None.
        dilation: blocks between taps.
        block_in: samples per input block (the stride).
        block_out: samples per output block (the stride of a transposed convolution).
        elu: apply ELU to the input.
        replicate: before the first sample, the stream repeats it instead of being silent.
    """

    def __init__(
        self,
        taps: Tensor,
        bias: Tensor | None,
        *,
        dilation: int = 1,
        block_in: int = 1,
        block_out: int = 1,
        elu: bool = False,
        replicate: bool = False,
    ) -> None:
        self.num_taps, self.width = taps.shape[1:]
        self.linear = Linear(taps.flatten(1), bias)
        self.dilation, self.block_in, self.block_out = dilation, block_in, block_out
        self.context = (self.num_taps - 1) * dilation
        self.elu, self.replicate = elu, replicate

    @classmethod
    def strided(
        cls,
        tensors: TensorReader,
        name: str,
        shape: tuple[int, int, int],
        *,
        bias=True,
        stride=1,
        **how,
    ) -> "CausalConv":
        """From the weight of a Conv1d, `shape` = `[Cout, Cin, kernel]`, stride | kernel."""
        weight = tensors(f"{name}.weight", *shape)
        taps = weight.unflatten(2, (-1, stride)).permute(0, 2, 3, 1).flatten(2)
        return cls(
            taps, tensors(f"{name}.bias", shape[0]) if bias else None, block_in=stride, **how
        )

    @classmethod
    def transposed(
        cls,
        tensors: TensorReader,
        name: str,
        channels: tuple[int, int],
        stride: int,
        *,
        bias=True,
        groups=1,
        **how,
    ) -> "CausalConv":
        """From the weight of a ConvTranspose1d, `[Cin, Cout / groups, 2 * stride]`."""
        c_in, c_out = channels
        weight = tensors(f"{name}.weight", c_in, c_out // groups, 2 * stride)
        if groups > 1:
            blocks = weight.unflatten(0, (groups, -1)).unbind(3)
            weight = torch.stack([torch.block_diag(*tap) for tap in blocks], dim=2)
        taps = weight.unflatten(2, (2, stride)).flip(2).permute(3, 1, 2, 0).flatten(0, 1)
        offset = tensors(f"{name}.bias", c_out).repeat(stride) if bias else None
        return cls(taps, offset, block_out=stride, **how)

    def contexts(self) -> Iterator[tuple[int, int]]:
        """The shapes `(blocks, width)` of what a stream remembers for this layer."""
        if self.context:
            yield self.context, self.width

    def __call__(self, x: Tensor, past: "Past", add: Tensor | None = None) -> Tensor:
        """Convolve a chunk.

        Args:
            x: `[T, B, Cin]`, T a multiple of the stride.
            past: what came before; read and brought up to date.
            add: `[T_out, B, Cout]` to be summed to the output, or None. Only without blocks out.

        Returns:
            `[T_out, B, Cout]`, contiguous.
        """
        if self.elu:
            x = F.elu(x)
        batch, first = x.shape[1], x[:1]
        if self.block_in > 1:
            x = x.unflatten(0, (-1, self.block_in)).transpose(1, 2)
            x = x.reshape(-1, batch, self.width)
        steps = x.shape[0]
        if self.context:
            x = past.extend(x, first.repeat(1, 1, self.block_in) if self.replicate else None)
            row = batch * self.width
            windows = (steps, batch, self.num_taps, self.width)
            x = x.as_strided(windows, (row, self.width, self.dilation * row, 1))
        x = x.reshape(steps * batch, self.num_taps * self.width)
        y = self.linear(x, None if add is None else add.view(steps * batch, -1))
        y = y.view(steps, batch, self.block_out, -1).transpose(1, 2)
        return y.reshape(steps * self.block_out, batch, -1).contiguous()


class DepthwiseUpsample:
    """A transposed convolution of kernel `2 s` and stride `s`, every channel by itself, no bias.

    Args:
        weight: `[C, 1, 2 s]`, as in a ConvTranspose1d with C groups.
    """

    def __init__(self, weight: Tensor) -> None:
        self.width = weight.shape[0]
        new, old = weight.squeeze(1).t().contiguous().chunk(2)
        self.new, self.old = new.unsqueeze(1), old.unsqueeze(1)  # [s, 1, C]

    def contexts(self) -> Iterator[tuple[int, int]]:
        yield 1, self.width

    def __call__(self, x: Tensor, past: "Past") -> Tensor:
        """Args: x `[T, B, C]`. Returns `[s T, B, C]`."""
        x = past.extend(x).unsqueeze(1)
        return torch.addcmul(x[:-1] * self.old, x[1:], self.new).flatten(0, 1)


class Past:
    """The inputs that convolutions remember, handed out layer after layer and collected anew.

    Args:
        lefts: per layer with a context `[B, context, width]`, in the layers' order.
        fresh: `[B]` bool, the rows whose stream has not begun.
    """

    def __init__(self, lefts: Iterable[Tensor], fresh: Tensor) -> None:
        self._lefts, self._fresh = iter(lefts), fresh[:, None, None]
        self._collected: list[Tensor] = []

    def extend(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """Put the next layer's past before its input.

        Args:
            x: `[T, B, width]`.
            first: `[1, B, width]`, taken as the past of fresh rows; None keeps what is stored.

        Returns:
            `[context + T, B, width]`, contiguous.
        """
        left = next(self._lefts)
        if first is not None:
            left = torch.where(self._fresh, first.transpose(0, 1), left)
        x = torch.cat([left.transpose(0, 1), x])
        # A copy, because a view would keep all of the chunk's activations alive.
        self._collected.append(x[-left.shape[1] :].transpose(0, 1).clone())
        return x

    def collected(self) -> tuple[Tensor, ...]:
        """The new past of every layer, once all have run."""
        return tuple(self._collected)


class ResidualUnit:
    """`x + conv1(ELU(convk(ELU(x))))`, or with a 1x1 convolution in place of the first `x`.

    Args:
        config: the codec's sizes.
        tensors, name: where the weights are.
        channels: C.
        depth: the unit's place among the residual units of its resolution; sets the dilation.
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

    def contexts(self) -> Iterator[tuple[int, int]]:
        return self.narrow.contexts()

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """Args: x `[T, B, C]`. Returns `[T, B, C]`."""
        kept = x if self.shortcut is None else self.shortcut(x, past)
        return self.widen(self.narrow(x, past), past, add=kept)
