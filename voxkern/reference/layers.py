from collections.abc import Callable

from torch import Tensor

from voxkern.layers import LlamaLayers
from voxkern.reference.linear import linear, project
from voxkern.reference.rms_norm import rms_norm
from voxkern.reference.silu_mul import silu_mul


def run_layers(
    layers: LlamaLayers, x: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """All Llama layers for x `[B, C]`, without the last norm.

    `attend(layer, q, k, v)` stores k and v, and returns the attention's output `[B, Hq, D]`.
    """
    residual = x.clone()
    for i in range(len(layers.qkv)):
        normed = rms_norm(residual, layers.attn_norm[i], layers.eps)
        q, k, v = layers.split_heads(project(normed, layers.qkv[i], layers.qkv_rows))
        attended = attend(i, q, k, v).flatten(1)
        residual += project(attended, layers.o[i], layers.width)
        normed = rms_norm(residual, layers.mlp_norm[i], layers.eps)
        activated = silu_mul(linear(normed, layers.gate_up[i]))
        residual += project(activated, layers.down[i], layers.width)
    return residual
