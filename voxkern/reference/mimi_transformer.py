import torch
import torch.nn.functional as F
from torch import Tensor

from voxkern.quantize import num_columns
from voxkern.reference.linear import project_float

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def mimi_transformer(
    x: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    norms: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    o: Tensor,
    o_bias: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
    activation: str,
    keys: Tensor,
    values: Tensor,
    window: int,
) -> Tensor:
    steps, width = x.shape[1:]
    num_kv_heads, capacity, head_dim = keys.shape[2:]
    num_heads = qkv_bias.shape[1] // head_dim - 2 * num_kv_heads

    steps_at = positions[:, None] + torch.arange(steps, device=x.device)
    angles = steps_at[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    def rotate(heads: Tensor) -> Tensor:
        low, high = heads.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    # Positions that any query sees, oldest first; the first ones may be below 0.
    offsets = torch.arange(1 - window, steps, device=x.device)
    seen_at = positions[:, None] + offsets
    distance = torch.arange(steps, device=x.device)[:, None] - offsets
    seen = ((distance >= 0) & (distance < window)) & (seen_at >= 0)[:, None]
    streams = torch.arange(len(x), device=x.device)[:, None]

    def append(ring: Tensor, new: Tensor) -> Tensor:
        """Write new `[B, Hkv, T, D]` to the ring; return `[B, Hkv, window - 1 + T, D]` at
        `seen_at`."""
        ring[streams, :, steps_at % capacity] = new.transpose(1, 2)
        window_rows = ring[streams, :, seen_at % capacity].transpose(1, 2)
        # A slot that no step has written may hold anything, including NaN.
        return window_rows.masked_fill((seen_at < 0)[:, None, :, None], 0)

    for i in range(len(norms)):
        before, after = norms[i].unflatten(0, (2, 2))
        normed = F.layer_norm(x, (width,), before[0], before[1], eps)
        heads = project_float(normed, qkv[i], qkv_bias.shape[1]) + qkv_bias[i]
        q, k, v = (
            heads.unflatten(-1, (-1, head_dim))
            .transpose(1, 2)
            .split((num_heads, num_kv_heads, num_kv_heads), 1)
        )
        attended = F.scaled_dot_product_attention(
            rotate(q),
            append(keys[:, i], rotate(k)),
            append(values[:, i], v),
            seen[:, None],
            enable_gqa=num_heads != num_kv_heads,
        )
        x = x + project_float(attended.transpose(1, 2).flatten(2), o[i], width) + o_bias[i]
        normed = F.layer_norm(x, (width,), after[0], after[1], eps)
        hidden = ACTIVATIONS[activation](project_float(normed, up[i], num_columns(down[i])))
        x = x + project_float(hidden, down[i], width)
    return x
