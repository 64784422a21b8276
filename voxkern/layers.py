"""Weights of a transformer's layers, as the backends pass them on.

The ops take these tensors one by one, because an op's schema has no structs; `voxkern.ops` says
what each of them is.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LlamaLayers:
    """Stacked weights `[L, ..]` of Llama layers, and the norm after the last layer."""

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
        """Rows of one layer's qkv, without the padding rows of a packed weight."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, Hq, D]`, k and v `[B, Hkv, D]`: views of qkv `[B, (Hq + 2 Hkv) D]`."""
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = qkv.unflatten(1, (-1, self.head_dim)).split(sizes, 1)
        return q, k, v


@dataclass(frozen=True)
class MimiLayers:
    """Stacked weights `[L, ..]` of the layers of Mimi's transformer."""

    norms: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    o: Tensor
    o_bias: Tensor
    up: Tensor
    down: Tensor
