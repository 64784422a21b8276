import torch
from torch import Tensor

from voxkern.layers import MimiLayers
from voxkern.quantize import format_of, num_columns
from voxkern.triton.checks import check, check_dim, check_operand
from voxkern.triton.codec_attention import launch_codec_attention
from voxkern.triton.codec_gemm import launch_codec_gemm

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


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
    """Five launches per layer: norm and qkv; rotation, KV write and attention; o and residual;
    norm, up and activation; down and residual."""
    x = x.contiguous()
    if x.data_ptr() % 16:  # the width of its loads changes the order of a norm's sums
        x = x.clone()
    layers = MimiLayers(norms, qkv, qkv_bias, o, o_bias, up, down)
    check_transformer(x, positions, frequencies, layers, activation, keys, values, window)
    batch, steps, _ = x.shape
    if not len(norms) or not x.numel():
        return x.clone()
    head_dim = keys.shape[4]
    num_heads = o.shape[2] // head_dim

    steps_at = positions[:, None] + torch.arange(steps, device=x.device)
    angles = steps_at[:, :, None] * frequencies
    rotations = torch.cat((angles.cos(), angles.sin()), -1)

    out = torch.empty_like(x)
    heads = x.new_empty(batch, steps, qkv.shape[1])
    attended = x.new_empty(batch, steps, num_heads, head_dim)
    hidden = x.new_empty(batch, steps, up.shape[1])
    for i in range(len(norms)):
        residual = out if i else x
        before, after = norms[i, :2], norms[i, 2:]
        launch_codec_gemm(residual, qkv[i], heads, norm=before, eps=eps, bias=qkv_bias[i])
        launch_codec_attention(
            heads, rotations, positions, keys[:, i], values[:, i], window, attended
        )
        launch_codec_gemm(attended.flatten(2), o[i], out, bias=o_bias[i], add=residual)
        launch_codec_gemm(out, up[i], hidden, norm=after, eps=eps, activation=activation)
        launch_codec_gemm(hidden, down[i], out, add=out)
    return out


def check_transformer(
    x: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    layers: MimiLayers,
    activation: str,
    keys: Tensor,
    values: Tensor,
    window: int,
) -> None:
    check_operand(x, "x", x, torch.float32)
    down, qkv_bias = layers.down, layers.qkv_bias
    for name, t, dim in (
        ("x", x, 3),
        ("frequencies", frequencies, 1),
        ("norms", layers.norms, 3),
        ("qkv_bias", qkv_bias, 2),
        ("keys", keys, 5),
        ("down", down, 3),
    ):
        check_dim(t, name, dim)
    (batch, steps, width), depth, head_dim = x.shape, len(layers.norms), 2 * len(frequencies)
    _, _, kv_heads, capacity, _ = keys.shape
    ffn, ring = num_columns(down), "[B, L, Hkv, capacity, D]"
    check(width >= 1, f"x: expected [B, T, C] with C >= 1, got shape {list(x.shape)}")
    check(head_dim >= 2, "frequencies: expected one or more, got none")
    check(kv_heads >= 1, f"keys: expected {ring} with Hkv >= 1, got {list(keys.shape)}")
    check(ffn >= 1, f"down: expected F >= 1, got shape {list(down.shape)}")
    rows = qkv_bias.shape[1]
    heads = rows // head_dim - 2 * kv_heads
    check(
        heads >= 1 and heads % kv_heads == 0 and rows == (heads + 2 * kv_heads) * head_dim,
        "qkv_bias: expected [L, (Hq + 2 Hkv) D] with Hq a multiple of Hkv, got "
        f"{list(qkv_bias.shape)}",
    )
    check(window >= 1, f"window: expected 1 or more, got {window}")
    minimum = window - 1 + steps
    check(
        capacity >= minimum,
        f"keys: expected {ring} with capacity >= window - 1 + T = {minimum}, got "
        f"{list(keys.shape)}",
    )
    check_operand(positions, "positions", x, torch.int64, "[B]", (batch,))
    ring_sizes = batch, depth, kv_heads, capacity, head_dim
    for name, t, letters, sizes in (
        ("frequencies", frequencies, "[D / 2]", (head_dim // 2,)),
        ("keys", keys, ring, ring_sizes),
        ("values", values, ring, ring_sizes),
        ("norms", layers.norms, "[L, 4, C]", (depth, 4, width)),
        ("qkv_bias", qkv_bias, "[L, (Hq + 2 Hkv) D]", (depth, rows)),
        ("o_bias", layers.o_bias, "[L, C]", (depth, width)),
    ):
        check_operand(t, name, x, torch.float32, letters, sizes)
    for name, t, letters, sizes in (
        ("qkv", layers.qkv, "[L, (Hq + 2 Hkv) D, C]", (depth, rows, width)),
        ("o", layers.o, "[L, C, Hq D]", (depth, width, heads * head_dim)),
        ("up", layers.up, "[L, F, C]", (depth, ffn, width)),
        ("down", down, "[L, C, F]", (depth, width, ffn)),
    ):
        check(
            format_of(t) == "none",
            f"{name}: packed weights are not supported on CUDA by the codec's transformer",
        )
        dtype = torch.bfloat16 if t.dtype == torch.bfloat16 else torch.float32
        check_operand(t, name, x, dtype, letters, sizes)
    check(
        activation in ACTIVATIONS,
        f"activation: expected gelu, gelu_tanh, relu or silu, got {activation}",
    )
