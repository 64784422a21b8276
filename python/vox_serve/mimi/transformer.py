"""The codec's transformers, with a sliding window of keys in ring buffers of the caller."""

import torch
from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.tensors import TensorReader
from voxkern import ops

CHUNK_FRAMES = 8
"""Most frames in a chunk: enough to amortise reading the weights, few enough that activations stay
in cache."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Transformer:
    """Pre-norm transformer with rotary positions and a window of `sliding_window` keys.

    Args:
        config: the codec's sizes.
        tensors: reader of the weights.
        name: their prefix, `decoder_transformer` or `encoder_transformer`.
    """

    def __init__(self, config: MimiConfig, tensors: TensorReader, name: str) -> None:
        self.width, self.window = config.hidden_size, config.sliding_window
        self.num_layers = config.num_hidden_layers
        capacity = self.window - 1 + CHUNK_FRAMES * config.latent_stride
        self.ring_shape = self.num_layers, config.num_key_value_heads, capacity, config.head_dim
        self.eps, self.activation = config.norm_eps, _ACTIVATIONS[config.hidden_act]
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        layers = [
            _read_layer(config, tensors, f"{name}.layers.{i}") for i in range(self.num_layers)
        ]
        # One tensor per kind of weight, [L, ...].
        self.weights = [torch.stack(kind) for kind in zip(*layers, strict=True)]
        for i, weight in enumerate(self.weights):
            if weight.dim() == 3 and i:
                self.weights[i] = tensors.matrices(weight)
        self.frequencies = (1.0 / config.rope_theta**exponents).to(tensors.device)

    def ring(self, batch_size: int) -> Tensor:
        """A ring buffer for the keys or the values of streams, uninitialised: on a CPU, the OS
        allocates a row's memory only when a stream first uses it."""
        return torch.empty(batch_size, *self.ring_shape, device=self.frequencies.device)

    def __call__(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Run a chunk.

        Args:
            x: `[B, T, C]`, the steps of at most `CHUNK_FRAMES` frames.
            positions: `[B]` int64, position of each row's first step.
            keys, values: the ring buffers, updated in place.

        Returns:
            `[B, T, C]`.
        """
        if not self.num_layers:
            return x
        return ops.mimi_transformer(  # type: ignore[call-arg]
            x,
            positions,
            self.frequencies,
            *self.weights,  # type: ignore[arg-type]
            self.eps,
            self.activation,
            keys,
            values,
            self.window,
        )


def _read_layer(config: MimiConfig, tensors: TensorReader, name: str) -> list[Tensor]:
    """A layer's norms, qkv, qkv_bias, o, o_bias, up and down, as `mimi_transformer` takes them."""
    width, hidden, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    norms = [
        tensors(f"{name}.{norm}.{kind}", width)
        for norm in ("input_layernorm", "post_attention_layernorm")
        for kind in ("weight", "bias")
    ]

    def projection(which: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        weight = tensors(f"{name}.self_attn.{which}.weight", rows, columns)
        if config.attention_bias:
            return weight, tensors(f"{name}.self_attn.{which}.bias", rows)
        return weight, weight.new_zeros(rows)

    parts = [
        projection("q_proj", heads * dim, width),
        projection("k_proj", kv_heads * dim, width),
        projection("v_proj", kv_heads * dim, width),
    ]
    qkv, qkv_bias = (torch.cat(part) for part in zip(*parts, strict=True))
    o, o_bias = projection("o_proj", width, heads * dim)
    up = tensors(f"{name}.mlp.fc1.weight", hidden, width)
    down = tensors(f"{name}.mlp.fc2.weight", width, hidden)
    # The layer scales are folded into the last matrix of their branch.
    scale = tensors(f"{name}.self_attn_layer_scale.scale", width)
    o, o_bias = o * scale[:, None], o_bias * scale
    down = down * tensors(f"{name}.mlp_layer_scale.scale", width)[:, None]
    return [torch.stack(norms), qkv, qkv_bias, o, o_bias, up, down]
