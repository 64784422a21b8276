"""A stack of Llama's layers for one token of each row: what decode_backbone and decode_depth
share.

Kernel after kernel without a wait on the host, so that a CUDA graph can hold it. Results are
rounded where the composed ops store them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from voxkern.quantize import format_of, num_columns
from voxkern.triton.append_kv import launch_append_kv
from voxkern.triton.checks import check, check_dim, check_operand
from voxkern.triton.decode_attention import launch_decode_attention
from voxkern.triton.linear import check_matrix, launch_linear
from voxkern.triton.rms_norm import launch_rms_norm
from voxkern.triton.silu_mul import launch_silu_mul


def project(x: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    """`[B, num_rows]`: without the rows that fill up a packed weight's last block."""
    out = x.new_empty(x.shape[0], num_rows)
    launch_linear(x, weight, out)
    return out


@dataclass(frozen=True)
class Places:
    """Where keys and values go, and which of them each row attends to; as in `append_kv` and
    `decode_attention`."""

    positions: Tensor
    slots: Tensor
    k_pages: Tensor  # [L, P, Hkv, S, D]
    v_pages: Tensor
    page_table: Tensor
    seq_lens: Tensor


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

    def run(self, residual: Tensor, places: Places) -> Tensor:
        """The hidden states `[B, C]` after the last norm; `residual`, contiguous, is added to."""
        branch = None
        for i in range(len(self.qkv)):
            x = self._normalise(branch, residual, self.attn_norm[i])
            attended = self._attend(x, i, places)
            branch = project(attended.flatten(1), self.o[i], self.width)
            x = self._normalise(branch, residual, self.mlp_norm[i])
            gate_up = project(x, self.gate_up[i], 2 * num_columns(self.down))
            product = x.new_empty(x.shape[0], num_columns(self.down))
            launch_silu_mul(gate_up, product)
            branch = project(product, self.down[i], self.width)
        return self._normalise(branch, residual, self.norm)

    @property
    def width(self) -> int:
        return len(self.norm)

    @property
    def head_dim(self) -> int:
        return self.rope_table.shape[1]

    def _normalise(self, branch: Tensor | None, residual: Tensor, weight: Tensor) -> Tensor:
        """The norm of the residual, with a branch's output added first if there is one."""
        out = torch.empty_like(residual)
        if branch is None:
            launch_rms_norm(residual, None, weight, self.eps, out)
        else:
            launch_rms_norm(branch, residual, weight, self.eps, out)
        return out

    def _attend(self, x: Tensor, layer: int, places: Places) -> Tensor:
        """`[B, Hq, D]`."""
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        qkv = project(x, self.qkv[layer], sum(heads) * self.head_dim)
        q, k, v = qkv.view(len(x), sum(heads), self.head_dim).split(heads, 1)
        k_pages, v_pages = places.k_pages[layer], places.v_pages[layer]
        launch_append_kv(q, k, v, self.rope_table, places.positions, places.slots, k_pages, v_pages)
        out = x.new_empty(q.shape)
        scale = self.head_dim**-0.5
        launch_decode_attention(q, k_pages, v_pages, places.page_table, places.seq_lens, scale, out)
        return out

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
