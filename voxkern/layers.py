"""The weights of a transformer's layers as one object, for callers and backends of the ops.

The schema of an op cannot contain a struct, so the ops themselves take these tensors one by one;
`voxkern.ops` documents each.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LlamaLayers:
    """Weights of L Llama layers, and what all of them share.

    The weights are stacked, `[L, ...]`, except `norm`, `[C]`, the norm after the last layer. Shared
    are `rope_table`, `[max_positions, D]`, the numbers of heads, and `eps`, of every norm.
    """

    attn_norm: Tensor
    qkv: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    norm: Tensor
    rope_table: Tensor
    num_heads: int
    num_kv_heads: int
    eps: float

    @property
    def width(self) -> int:
        return len(self.norm)

    @property
    def head_dim(self) -> int:
        return self.rope_table.shape[1]

    @property
    def qkv_rows(self) -> int:
        """Rows of one layer's qkv, `(Hq + 2 Hkv) D`, without a packed weight's padding rows."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, Hq, D]`, k and v `[B, Hkv, D]`: views of qkv `[B, (Hq + 2 Hkv) D]`."""
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = qkv.unflatten(1, (-1, self.head_dim)).split(sizes, 1)
        return q, k, v


@dataclass(frozen=True)
class DepthDecoder(LlamaLayers):
    """Weights of `decode_depth`: its layers, and the matrices before and after them.

    `audio_rows` is `[K * V, C]`, `projection` `[C, Cb]` and `heads` `[K - 1, V, C]`.
    """

    audio_rows: Tensor
    projection: Tensor
    heads: Tensor


@dataclass(frozen=True)
class MimiLayers:
    """Weights of the L layers of Mimi's transformer, all stacked: `[L, ...]`."""

    norms: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    o: Tensor
    o_bias: Tensor
    up: Tensor
    down: Tensor
