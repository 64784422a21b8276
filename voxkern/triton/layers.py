"""Llama layers for one token per row, shared by decode_backbone and decode_depth.

With at most MAX_FUSED_ROWS rows a layer takes four launches and the op's own attention:

    norm, qkv | attention | o, residual | norm, gate and up, SwiGLU | down, residual

With more rows, norms and SwiGLU are separate launches. A packed weight adds a launch that quantizes
x and also computes the norm or SwiGLU. Either way, results are rounded where the composed ops store
them. Nothing waits for the host, so a CUDA graph can hold all of it.

Programmatic dependent launch (Triton's launch_pdl) is not used: only NVIDIA from sm_90 on has its
instructions, and neither AMD's compiler nor the interpreter accepts them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from voxkern.layers import LlamaLayers
from voxkern.quantize import format_of, num_columns
from voxkern.triton.checks import check, check_dim, check_operand
from voxkern.triton.linear import MAX_FUSED_ROWS, check_matrix, launch_dense_gemm, launch_linear
from voxkern.triton.packed_gemm import launch_packed_gemm
from voxkern.triton.silu_mul import launch_silu_mul


@dataclass(frozen=True)
class Layers(LlamaLayers):
    """Launches for a stack of layers."""

    def run(
        self,
        residual: Tensor,
        attend: Callable[[int, Tensor, Tensor], None],
        keys_only: bool = False,
    ) -> Tensor:
        """Run all layers, without the last norm: `[B, C]`, contiguous, to `[B, C]`.

        Args:
            attend: called with the layer, qkv `[B, (Hq + 2 Hkv) D]` and the output `[B, Hq D]`,
                which it writes.
            keys_only: stop after the last layer's attention, which has written its keys and values.
        """
        for i in range(len(self.qkv)):
            qkv = self.project(residual, self.qkv[i], self.qkv_rows, self.attn_norm[i])
            attended = qkv.new_empty(len(qkv), self.num_heads * self.head_dim)
            attend(i, qkv, attended)
            if keys_only and i == len(self.qkv) - 1:
                break
            residual = self.project(attended, self.o[i], self.width, add=residual)
            residual = self._feed_forward(residual, self.mlp_norm[i], self.gate_up[i], self.down[i])
        return residual

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        num_rows: int,
        norm: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        """GEMM with an optional norm as prologue and residual as epilogue: `[B, num_rows]`, without
        the padding rows of a packed weight's last block."""
        out = x.new_empty(len(x), num_rows)
        launch_linear(x, weight, out, norm, self.eps, add)
        return out

    def _feed_forward(
        self, residual: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        ffn = num_columns(down)
        activated = residual.new_empty(len(residual), ffn)
        if len(residual) <= MAX_FUSED_ROWS and format_of(gate_up) == "none":
            launch_dense_gemm(residual, gate_up, activated, norm, self.eps, swiglu=True)
        else:
            gate_and_up = self.project(residual, gate_up, 2 * ffn, norm)
            if format_of(down) != "none":
                out = residual.new_empty(residual.shape)
                launch_packed_gemm(gate_and_up, down, out, swiglu=True, add=residual)
                return out
            launch_silu_mul(gate_and_up, activated)
        return self.project(activated, down, self.width, add=residual)

    def check(self, like: Tensor, width: int) -> None:
        """Check all shapes, for layers of width C = `width` with the device and dtype of `like`."""
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
            ("qkv", "[L, (Hq + 2 Hkv) D, C]", self.qkv_rows, width),
            ("o", "[L, C, Hq D]", width, heads * head_dim),
            ("gate_up", "[L, 2F, C]", 2 * ffn, width),
            ("down", "[L, C, F]", width, ffn),
        ):
            check_matrix(getattr(self, name), name, like, letters, (layers, rows, columns))
