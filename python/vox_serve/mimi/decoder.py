"""Latents to samples: upsampling, transformer, SEANet decoder."""

from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.conv import CausalConv, DepthwiseUpsample, Past, ResidualUnit
from vox_serve.mimi.state import StreamState
from vox_serve.mimi.tensors import TensorReader
from vox_serve.mimi.transformer import Transformer


class Decoder:
    """The decoding half after the quantizer.

    Args:
        config: the codec's sizes.
        tensors: where the weights are.
    """

    def __init__(self, config: MimiConfig, tensors: TensorReader) -> None:
        width, stride = config.hidden_size, config.latent_stride
        replicate = config.pad_mode == "replicate"
        self.upsample = None
        if config.resamples and config.upsample_groups == width:
            self.upsample = DepthwiseUpsample(tensors("upsample.conv.weight", width, 1, 2 * stride))
        elif config.resamples:
            self.upsample = CausalConv.transposed(
                tensors,
                "upsample.conv",
                (width, width),
                stride,
                bias=False,
                groups=config.upsample_groups,
            )
        self.transformer = Transformer(config, tensors, "decoder_transformer")

        channels = config.num_filters * 2 ** len(config.upsampling_ratios)
        shape = (channels, width, config.kernel_size)
        first = CausalConv.strided(tensors, "decoder.layers.0.conv", shape, replicate=replicate)
        self.layers: list[CausalConv | ResidualUnit] = [first]
        index = 2  # checkpoints count the activations between the layers too
        for ratio in config.upsampling_ratios:
            pair = (channels, channels // 2)
            name = f"decoder.layers.{index}.conv"
            self.layers.append(CausalConv.transposed(tensors, name, pair, ratio, elu=True))
            channels //= 2
            for j in range(config.num_residual_layers):
                self.layers.append(
                    ResidualUnit(config, tensors, f"decoder.layers.{index + 1 + j}", channels, j)
                )
            index += 2 + config.num_residual_layers
        shape = (1, channels, config.last_kernel_size)
        name = f"decoder.layers.{index}.conv"
        self.layers.append(CausalConv.strided(tensors, name, shape, elu=True, replicate=replicate))

    def contexts(self) -> list[tuple[int, int]]:
        """`(blocks, width)` of every left context of a stream, in order."""
        layers = self.layers if self.upsample is None else [self.upsample, *self.layers]
        return [context for layer in layers for context in layer.contexts()]

    def __call__(self, latent: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Args: latent `[N, B, C]`. Returns samples `[N * frame_samples, B]`, and the state."""
        past = Past(state.lefts, state.positions == 0)
        x = latent if self.upsample is None else self.upsample(latent, past)
        steps = x.shape[0]
        x, window = self.transformer(x, state.positions, state.window)
        for layer in self.layers:
            x = layer(x, past)
        return x.squeeze(2), StreamState(state.positions + steps, window, past.collected())
