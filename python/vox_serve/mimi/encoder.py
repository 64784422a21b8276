"""Samples to latents: SEANet encoder, transformer, downsampling."""

from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.conv import CausalConv, Past, ResidualUnit
from vox_serve.mimi.state import StreamState
from vox_serve.mimi.tensors import TensorReader
from vox_serve.mimi.transformer import Transformer


class Encoder:
    """The encoding half before the quantizer.

    Args:
        config: the codec's sizes.
        tensors: where the weights are.
    """

    def __init__(self, config: MimiConfig, tensors: TensorReader) -> None:
        width, stride = config.hidden_size, config.latent_stride
        replicate = config.pad_mode == "replicate"
        channels = config.num_filters
        shape = (channels, 1, config.kernel_size)
        first = CausalConv.strided(tensors, "encoder.layers.0.conv", shape, replicate=replicate)
        self.layers: list[CausalConv | ResidualUnit] = [first]
        index = 1  # checkpoints count the activations between the layers too
        for ratio in reversed(config.upsampling_ratios):
            for j in range(config.num_residual_layers):
                self.layers.append(
                    ResidualUnit(config, tensors, f"encoder.layers.{index + j}", channels, j)
                )
            index += config.num_residual_layers + 1
            self.layers.append(
                CausalConv.strided(
                    tensors,
                    f"encoder.layers.{index}.conv",
                    (2 * channels, channels, 2 * ratio),
                    stride=ratio,
                    elu=True,
                    replicate=replicate,
                )
            )
            channels *= 2
            index += 1
        shape = (width, channels, config.last_kernel_size)
        name = f"encoder.layers.{index + 1}.conv"
        self.layers.append(CausalConv.strided(tensors, name, shape, elu=True, replicate=replicate))

        self.transformer = Transformer(config, tensors, "encoder_transformer")
        self.downsample = None
        if config.resamples:
            self.downsample = CausalConv.strided(
                tensors,
                "downsample.conv",
                (width, width, 2 * stride),
                stride=stride,
                bias=False,
                replicate=True,
            )

    def contexts(self) -> list[tuple[int, int]]:
        """`(blocks, width)` of every left context of a stream, in order."""
        layers = self.layers if self.downsample is None else [*self.layers, self.downsample]
        return [context for layer in layers for context in layer.contexts()]

    def __call__(self, audio: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Args: audio `[N * frame_samples, B]`. Returns latents `[N, B, C]`, and the state."""
        past = Past(state.lefts, state.positions == 0)
        x = audio.unsqueeze(2)
        for layer in self.layers:
            x = layer(x, past)
        steps = x.shape[0]
        x, window = self.transformer(x, state.positions, state.window)
        if self.downsample is not None:
            x = self.downsample(x, past)
        return x, StreamState(state.positions + steps, window, past.collected())
