"""A stack of Llama's layers for one token of each row: what decode_backbone and decode_depth share.

A layer of at most FEW_ROWS rows is four launches and the op's own attention:

    norm, qkv | attention | o, residual | norm, gate and up, SwiGLU | down, residual

With more rows norms and SwiGLU are launches of their own, and a packed weight takes one to quantize
x, which does the norm or SwiGLU as well. Either way results are rounded where the composed ops
store them. Nothing waits on the host, so that a CUDA graph can hold it.

Programmatic dependent launch (Triton's launch_pdl) is left out: its instructions exist on NVIDIA
from sm_90 on alone, and neither AMD's compiler nor the interpreter takes them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from voxkern.quantize import format_of, num_columns
from voxkern.triton.checks import check, check_dim, check_operand
from voxkern.triton.linear import FEW_ROWS, check_matrix, launch_linear, launch_product
from voxkern.triton.packed_linear import launch_packed_linear
from voxkern.triton.silu_mul import launch_silu_mul


@dataclass(frozen=True)
class Layers:
    """Weights `[L, ..]`, and the norm behind the last layer."""

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

    def run(
        self,
        residual: Tensor,
        attend: Callable[[int, Tensor, Tensor], None],
        keys_only: bool = False,
    ) -> Tensor:
        """`[B, C]` before the last norm, from as much, contiguous.

        Args:
            attend: writes its third argument `[B, Hq D]` from its second `[B, (Hq + 2 Hkv) D]`;
                the first is the layer.
            keys_only: of the last layer only the attention runs.
        """
        heads = self.num_heads + 2 * self.num_kv_heads
        for i in range(len(self.qkv)):
            qkv = self.project(residual, self.qkv[i], heads * self.head_dim, self.attn_norm[i])
            attended = qkv.new_empty(len(qkv), self.num_heads * self.head_dim)
            attend(i, qkv, attended)
            if keys_only and i == len(self.qkv) - 1:
                break
            residual = self.project(attended, self.o[i], self.width, add=residual)
            residual = self._feed(residual, self.mlp_norm[i], self.gate_up[i], self.down[i])
        return residual

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        num_rows: int,
        norm: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        """`[B, num_rows]`: without the rows that fill up a packed weight's last block."""
        out = x.new_empty(len(x), num_rows)
        launch_linear(x, weight, out, norm, self.eps, add)
        return out

    @property
    def width(self) -> int:
        return len(self.norm)

    @property
    def head_dim(self) -> int:
        return self.rope_table.shape[1]

    def _feed(self, residual: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ffn = num_columns(down)
        product = residual.new_empty(len(residual), ffn)
        if len(residual) <= FEW_ROWS and format_of(gate_up) == "none":
            launch_product(residual, gate_up, product, norm, self.eps, swiglu=True)
        else:
            both = self.project(residual, gate_up, 2 * ffn, norm)
            if format_of(down) != "none":
                out = residual.new_empty(residual.shape)
                launch_packed_linear(both, down, out, swiglu=True, add=residual)
                return out
            launch_silu_mul(both, product)
        return self.project(product, down, self.width, add=residual)

    def check(self, like: Tensor, width: int) -> None:
        """Layers of that width, on the device and of the dtype of `like`."""
        check_dim(self.qkv, "qkv", 3)
        check_dim(self.down, "down", 3)
        check_dim(self.rope_table, "rope_table", 2)
        check_operand(self.rope_table, "rope_table", like, torch.float32)
        layers, ffn, head_dim = len(self.qkv), num_columns(self.down), self.head_dim
        heads, kv_heads = self.num_heads, self.num_kv_heads
        check(
            kv_heads >= 1 and heads >= 1 and heads % kv_heads == 0,
            f"num_heads: expected a multiple of num_kv_heads, got {heads} and {kv_heads}",
        )
        check(ffn >= 1, f"down: expected F >= 1, got shape {list(self.down.shape)}")
        check(
            head_dim >= 2 and head_dim % 2 == 0,
            f"rope_table: expected [positions, D] with D even, got {list(self.rope_table.shape)}",
        )
        check(
            format_of(self.gate_up) == "none" or ffn % 16 == 0,
            f"gate_up: packed, which needs F in a multiple of 16, got {ffn}",
        )
        for name in ("attn_norm", "mlp_norm"):
            check_operand(getattr(self, name), name, like, like.dtype, "[L, C]", (layers, width))
        check_operand(self.norm, "norm", like, like.dtype, "[C]", (width,))
        for name, letters, rows, columns in (
            ("qkv", "[L, (Hq + 2 Hkv) D, C]", (heads + 2 * kv_heads) * head_dim, width),
            ("o", "[L, C, Hq D]", width, heads * head_dim),
            ("gate_up", "[L, 2F, C]", 2 * ffn, width),
            ("down", "[L, C, F]", width, ffn),
        ):
            check_matrix(getattr(self, name), name, like, letters, (layers, rows, columns))
