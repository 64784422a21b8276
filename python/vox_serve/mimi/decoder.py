"""Latents to samples: upsampling, transformer, SEANet decoder."""

from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.conv import CausalConv, Chain, DepthwiseUpsample, ResidualUnit
from vox_serve.mimi.state import StreamState
from vox_serve.mimi.tensors import TensorReader
from vox_serve.mimi.transformer import Transformer


class Decoder:
    """The codec's decoding half, after the quantizer.

    Args:
        config: the codec's sizes.
        tensors: reader of the weights.
    """

    def __init__(self, config: MimiConfig, tensors: TensorReader) -> None:
        width, stride = config.hidden_size, config.latent_stride
        replicate = config.pad_mode == "replicate"
        self.upsample: DepthwiseUpsample | Chain | None = None
        if config.resamples and config.upsample_groups == width:
            self.upsample = DepthwiseUpsample(tensors("upsample.conv.weight", width, 1, 2 * stride))
        elif config.resamples:
            upsample = CausalConv.transposed(
                tensors,
                "upsample.conv",
                (width, width),
                stride,
                bias=False,
                groups=config.upsample_groups,
            )
            self.upsample = Chain([upsample])
        self.transformer = Transformer(config, tensors, "decoder_transformer")

        channels = config.num_filters * 2 ** len(config.upsampling_ratios)
        shape = (channels, width, config.kernel_size)
        first = CausalConv.strided(tensors, "decoder.layers.0.conv", shape, replicate=replicate)
        layers: list[CausalConv | ResidualUnit] = [first]
        index = 2  # checkpoints also number the activations between the layers
        for ratio in config.upsampling_ratios:
            pair = (channels, channels // 2)
            name = f"decoder.layers.{index}.conv"
            layers.append(CausalConv.transposed(tensors, name, pair, ratio, elu=True))
            channels //= 2
            for j in range(config.num_residual_layers):
                layers.append(
                    ResidualUnit(config, tensors, f"decoder.layers.{index + 1 + j}", channels, j)
                )
            index += 2 + config.num_residual_layers
        shape = (1, channels, config.last_kernel_size)
        name = f"decoder.layers.{index}.conv"
        layers.append(CausalConv.strided(tensors, name, shape, elu=True, replicate=replicate))
        self.convs = Chain(layers)
        self.contexts = [*(self.upsample.contexts if self.upsample else []), *self.convs.contexts]

    def __call__(self, latent: Tensor, state: StreamState) -> Tensor:
        """Args: latent `[B, N, C]`. Returns samples `[B, N * frame_samples]`."""
        x, fresh, past = latent, state.positions == 0, state.lefts
        if self.upsample:
            x, past = self.upsample(x, fresh, past[:1]), past[1:]
        x = self.transformer(x, *state[:3])
        state.positions.add_(x.shape[1])
        return self.convs(x, fresh, past).squeeze(2)
