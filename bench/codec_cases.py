"""The codec's ops at Mimi's size: one frame per stream, random weights, a full key window.

The peer is the op's reference, plain torch on the same tensors.
"""

import copy
import functools

import torch
from bench_backends import bind_backend
from kernel_case import Case

from vox_serve.mimi import Mimi


@functools.cache
def codec(precision: str, device: str) -> Mimi:
    from bench_codec import our_codecs, random_model

    return our_codecs(random_model(), [precision], device)[precision]


def codec_cases(dtype: torch.dtype, batch: int, device: str) -> list[Case]:
    """Cases for `batch` streams with the codec's weights in `dtype`; x and the state are float32.

    Inputs are made on torch's default device, which must be `device`; each set has its own weights.

    Raises:
        ImportError: transformers, whose model makes the weights, is not installed.
    """
    from bench_codec import layers

    mimi = functools.partial(codec, str(dtype).removeprefix("torch."), device)
    steps, width = mimi().config.latent_stride, mimi().config.hidden_size
    attention, *convs = layers(mimi(), batch)

    def transformer_inputs() -> tuple:
        transformer = copy.deepcopy(mimi().decoder.transformer)
        keys, values = (torch.randn(batch, *transformer.ring_shape) for _ in range(2))
        positions = torch.full((batch,), 2 * transformer.window)
        return transformer, torch.randn(batch, steps, width), positions, keys, values

    def convs_inputs() -> tuple:
        chain = copy.deepcopy(mimi().decoder.convs)
        past = [torch.randn(batch, *context) for context in chain.contexts]
        return chain, torch.randn(batch, steps, width), torch.zeros(batch, dtype=torch.bool), past

    def call(layer, *inputs):
        return layer(*inputs)

    plain = bind_backend("reference", call)
    return [
        Case(
            "mimi_transformer",
            f"{batch} frames",
            transformer_inputs,
            call,
            plain,
            attention.num_bytes,
            attention.operations,
        ),
        Case(
            "mimi_convs",
            f"{batch} frames",
            convs_inputs,
            call,
            plain,
            sum(layer.num_bytes for layer in convs),
            sum(layer.operations for layer in convs),
        ),
    ]
