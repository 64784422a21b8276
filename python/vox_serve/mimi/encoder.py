"""Samples to latents, one chunk at a time: SEANet encoder, transformer, downsampling."""

from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.conv import CausalConv, Chain, ResidualUnit
from vox_serve.mimi.state import StreamState
from vox_serve.mimi.tensors import TensorReader
from vox_serve.mimi.transformer import Transformer


class Encoder:
    """The codec's encoding half, before the quantizer.

    Args:
        config: the codec's sizes.
        tensors: reader of the weights.
    """

    def __init__(self, config: MimiConfig, tensors: TensorReader) -> None:
        width, stride = config.hidden_size, config.latent_stride
        replicate = config.pad_mode == "replicate"
        channels = config.num_filters
        shape = (channels, 1, config.kernel_size)
        first = CausalConv.strided(tensors, "encoder.layers.0.conv", shape, replicate=replicate)
        layers: list[CausalConv | ResidualUnit] = [first]
        index = 1  # checkpoints also number the activations between the layers
        for ratio in reversed(config.upsampling_ratios):
            for j in range(config.num_residual_layers):
                layers.append(
                    ResidualUnit(config, tensors, f"encoder.layers.{index + j}", channels, j)
                )
            index += config.num_residual_layers + 1
            layers.append(
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
        layers.append(CausalConv.strided(tensors, name, shape, elu=True, replicate=replicate))

        self.convs = Chain(layers)
        self.transformer = Transformer(config, tensors, "encoder_transformer")
        self.downsample = None
        if config.resamples:
            downsample = CausalConv.strided(
                tensors,
                "downsample.conv",
                (width, width, 2 * stride),
                stride=stride,
                bias=False,
                replicate=True,
            )
            self.downsample = Chain([downsample])
        self.contexts = [
            *self.convs.contexts,
            *(self.downsample.contexts if self.downsample else []),
        ]

    def __call__(self, audio: Tensor, state: StreamState) -> Tensor:
        """Encode the next N frames of B streams and update their state.

        Args:
            audio: `[B, N * frame_samples]`.
            state: of the encoding streams, updated in place.

        Returns:
            Latents `[B, N, C]`.
        """
        fresh, count = state.positions == 0, len(self.convs.contexts)
        x = self.convs(audio.unsqueeze(2), fresh, state.lefts[:count])
        x = self.transformer(x, *state[:3])
        state.positions.add_(x.shape[1])
        return self.downsample(x, fresh, state.lefts[count:]) if self.downsample else x
