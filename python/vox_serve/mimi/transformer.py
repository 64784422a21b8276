"""The codec's transformers: a sliding window of keys, passed in and out."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.conv import Linear
from vox_serve.mimi.state import KeyWindow
from vox_serve.mimi.tensors import TensorReader

Activation = Callable[[Tensor], Tensor]

_tanh_gelu: Activation = partial(F.gelu, approximate="tanh")
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


class Transformer:
    """Pre-norm transformer with rotary positions and a window of `sliding_window` keys.

    Args:
        config: the codec's sizes.
        tensors: where the weights are.
        name: their prefix, `decoder_transformer` or `encoder_transformer`.
    """

    def __init__(self, config: MimiConfig, tensors: TensorReader, name: str) -> None:
        self.layers = [
            _Layer(config, tensors, f"{name}.layers.{i}") for i in range(config.num_hidden_layers)
        ]
        self.past_keys = config.sliding_window - 1
        self.kv_shape = (config.num_key_value_heads, self.past_keys, config.head_dim)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.frequencies = 1.0 / config.rope_theta**exponents

    def __call__(self, x: Tensor, positions: Tensor, window: KeyWindow) -> tuple[Tensor, KeyWindow]:
        """Run a chunk.

        Args:
            x: `[T, B, C]`.
            positions: `[B]` int64, of each row's first step.
            window: the keys and values before them; only the last `positions[b]` of row b count.

        Returns:
            `[T, B, C]`, and the window after them.
        """
        steps = x.shape[0]
        offsets = torch.arange(steps, device=x.device)
        angles = (positions + offsets[:, None])[..., None, None] * self.frequencies.to(x.device)
        rotation = torch.polar(torch.ones_like(angles), angles)  # [T, B, 1, D / 2]

        # Slot s holds position `positions + s - past_keys`; query i sits in slot past_keys + i.
        slots = torch.arange(self.past_keys + steps, device=x.device)
        query = offsets[:, None]
        seen = (slots >= query) & (slots <= query + self.past_keys)
        written = slots >= self.past_keys - positions[:, None]
        mask = torch.zeros(len(positions), 1, steps, len(slots), device=x.device)
        mask.masked_fill_(~(seen & written[:, None, None]), -torch.inf)

        window = window.extended(steps)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, window, 2 * i)
        return x, window


class _Layer:
    """Attention, then MLP, each normed before and scaled after."""

    def __init__(self, config: MimiConfig, tensors: TensorReader, name: str) -> None:
        width, dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = dim
        self.norm_eps = config.norm_eps
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.norms = [
            (tensors(f"{name}.{norm}.weight", width), tensors(f"{name}.{norm}.bias", width))
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]

        def projection(which: str, heads: int, rotated: bool) -> tuple[Tensor, Tensor]:
            rows = heads * dim
            weight = tensors(f"{name}.self_attn.{which}.weight", rows, width)
            bias = torch.zeros(rows, device=weight.device)
            if config.attention_bias:
                bias = tensors(f"{name}.self_attn.{which}.bias", rows)
            if rotated:
                weight, bias = (_interleave_halves(part, heads) for part in (weight, bias))
            return weight, bias

        parts = [
            projection("q_proj", self.heads, True),
            projection("k_proj", self.kv_heads, True),
            projection("v_proj", self.kv_heads, False),
        ]
        weight, bias = (torch.cat(part) for part in zip(*parts, strict=True))
        self.qkv = Linear(weight, bias if config.attention_bias else None)

        # The layer scales are folded into the last product of their branch.
        scale = tensors(f"{name}.self_attn_layer_scale.scale", width)
        weight = tensors(f"{name}.self_attn.o_proj.weight", width, self.heads * dim)
        bias = tensors(f"{name}.self_attn.o_proj.bias", width) if config.attention_bias else None
        self.out = Linear(weight * scale[:, None], None if bias is None else bias * scale)
        scale = tensors(f"{name}.mlp_layer_scale.scale", width)
        hidden = config.intermediate_size
        self.up = Linear(tensors(f"{name}.mlp.fc1.weight", hidden, width))
        self.down = Linear(tensors(f"{name}.mlp.fc2.weight", width, hidden) * scale[:, None])

    def __call__(
        self, x: Tensor, rotation: Tensor, mask: Tensor, window: KeyWindow, place: int
    ) -> Tensor:
        """Args: x `[T, B, C]`; place, of this layer's keys in the window. Returns `[T, B, C]`."""
        steps, batch, width = x.shape
        x = x.reshape(steps * batch, width)
        qkv = self.qkv(self._norm(x, 0)).view(steps, batch, -1, self.dim)
        rotated = self.heads + self.kv_heads
        qk = qkv[:, :, :rotated].unflatten(-1, (-1, 2))
        qk = torch.view_as_real(torch.view_as_complex(qk) * rotation).flatten(-2)
        qk = qk.permute(1, 2, 0, 3)  # [B, H, T, D]
        seen = F.scaled_dot_product_attention(
            qk[:, : self.heads],
            window.write(place, qk[:, self.heads :]),
            window.write(place + 1, qkv[:, :, rotated:].permute(1, 2, 0, 3)),
            mask,
            enable_gqa=self.heads != self.kv_heads,
        )
        seen = seen.permute(2, 0, 1, 3).reshape(steps * batch, -1)
        x = self.out(seen, add=x)
        x = self.down(self.activation(self.up(self._norm(x, 1))), add=x)
        return x.view(steps, batch, width)

    def _norm(self, x: Tensor, which: int) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self.norms[which], self.norm_eps)


def _interleave_halves(rows: Tensor, heads: int) -> Tensor:
    """Order each head's rows as pairs `(i, i + D / 2)`, so that a rotation is one complex product.

    The order of a head's dimensions does not matter to `q . k`, as long as both share it.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
