"""CSM's two transformers as calls of voxkern's ops. Owns weights and no state."""

from typing import NamedTuple

import torch
from torch import Tensor

from vox_serve.kv_cache import CacheBatch, KvCache
from vox_serve.model_config import CsmConfig
from vox_serve.sampling import SamplingRows
from vox_serve.weights import CsmWeights
from voxkern import ops
from voxkern.persistent import decode_depth_persistent

PERSISTENT_ROWS = 8
"""Maximum rows of the persistent depth decoder (kMostRows in cuda/decoder/depth_products.cuh); with
more, `persistent` has no effect."""


class _Layer(NamedTuple):
    """One backbone layer's weights: views of the stacked tensors."""

    qkv: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    next_norm: Tensor  # the following layer's attn_norm, or the last norm


class CsmModel:
    """The backbone, and the depth decoder over a frame's codebooks.

    Args:
        config: the sizes.
        weights: on the device that is to run the model, in the dtype of its activations.
    """

    def __init__(self, config: CsmConfig, weights: CsmWeights):
        self.config = config
        self.weights = weights
        self.device = weights.text_table.device
        self.dtype = weights.text_table.dtype
        backbone = weights.backbone
        next_norms = [*backbone.attn_norm[1:], backbone.norm]
        self._layers = [
            _Layer(*tensors)
            for tensors in zip(
                backbone.qkv,
                backbone.o,
                backbone.mlp_norm,
                backbone.gate_up,
                backbone.down,
                next_norms,
                strict=True,
            )
        ]
        self._backbone_rope = config.backbone.rope_table().to(self.device)
        self._depth_rope = config.depth.rope_table().to(self.device)

    def backbone_step(
        self, frames: Tensor, mask: Tensor, batch: CacheBatch, cache: KvCache
    ) -> Tensor:
        """Run the backbone over new tokens, writing their keys and values to the cache.

        Args:
            frames: `[T, K + 1]` int64, the sequences' tokens one after the other.
            mask: `[T, K + 1]` bool, as in `voxkern.ops.embed_frames`.
            batch: where the tokens lie in the cache.
            cache: keys and values; written.

        Returns:
            `[B, C]`: each sequence's last hidden state, after the last norm.
        """
        x = ops.embed_frames(frames, mask, self.weights.audio_table, self.weights.text_table)
        if batch.cu_seqlens is None:
            return ops.decode_backbone(*self.backbone_arguments(x, batch, cache))
        return self._prefill(x, batch, cache)[batch.last_tokens]

    def backbone_arguments(self, x: Tensor, batch: CacheBatch, cache: KvCache) -> tuple:
        """The arguments of `voxkern.ops.decode_backbone`, in its order, for embedded tokens x."""
        w, c = self.weights.backbone, self.config.backbone
        return (
            x,
            w.attn_norm,
            w.qkv,
            w.o,
            w.mlp_norm,
            w.gate_up,
            w.down,
            w.norm,
            self._backbone_rope,
            c.num_heads,
            c.num_kv_heads,
            c.norm_eps,
            batch.positions,
            batch.slots,
            cache.k_pages,
            cache.v_pages,
            batch.page_table,
            batch.seq_lens,
        )

    def _prefill(self, residual: Tensor, batch: CacheBatch, cache: KvCache) -> Tensor:
        """Embedded prompt tokens `[T, C]` through the layers, op by op: their hidden states."""
        c = self.config.backbone
        scale = c.head_dim**-0.5
        assert batch.cu_seqlens is not None  # only a decoding batch has none
        x = ops.rms_norm(residual, self.weights.backbone.attn_norm[0], c.norm_eps)
        for layer, k_pages, v_pages in zip(self._layers, cache.k_pages, cache.v_pages, strict=True):
            qkv = ops.linear(x, layer.qkv).unflatten(1, (-1, c.head_dim))
            q, k, v = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
            ops.append_kv(
                q, k, v, self._backbone_rope, batch.positions, batch.slots, k_pages, v_pages
            )
            x = ops.prefill_attention(
                q, k_pages, v_pages, batch.page_table, batch.cu_seqlens, batch.seq_lens, scale
            )
            x = ops.linear(x.flatten(1), layer.o)
            x = ops.add_rms_norm(x, residual, layer.mlp_norm, c.norm_eps)
            x = ops.linear(ops.silu_mul(ops.linear(x, layer.gate_up)), layer.down)
            x = ops.add_rms_norm(x, residual, layer.next_norm, c.norm_eps)
        return x

    def draw_frames(self, hidden: Tensor, rows: SamplingRows, persistent: bool = False) -> Tensor:
        """Draw the next frame of every sequence.

        Args:
            hidden: `[B, C]`, from `backbone_step`.
            rows: sampling parameters of the B sequences.
            persistent: decode with `voxkern.persistent.decode_depth_persistent`.

        Returns:
            `[B, K]` int64.
        """
        logits = ops.linear(hidden, self.weights.code0_head)
        code0 = ops.sample_tokens(
            logits,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            rows.repetition_penalty,
            rows.history,
            rows.seeds,
            rows.frames,
            codebook=0,
        )
        arguments = self.depth_arguments(hidden, code0, rows)
        if persistent:
            return decode_depth_persistent(*arguments)
        return ops.decode_depth(*arguments)

    def depth_arguments(self, hidden: Tensor, code0: Tensor, rows: SamplingRows) -> tuple:
        """The arguments of `voxkern.ops.decode_depth`, in its order."""
        w, c = self.weights, self.config.depth
        return (
            hidden,
            code0,
            w.depth_audio_rows,
            w.projection,
            w.depth.attn_norm,
            w.depth.qkv,
            w.depth.o,
            w.depth.mlp_norm,
            w.depth.gate_up,
            w.depth.down,
            w.depth.norm,
            w.code_heads,
            self._depth_rope,
            c.num_heads,
            c.num_kv_heads,
            c.norm_eps,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            rows.seeds,
            rows.frames,
        )

    def next_inputs(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's input for frames of codes.

        Args:
            codes: `[T, K]` int64.

        Returns:
            Frames `[T, K + 1]` int64 and mask `[T, K + 1]` bool.
        """
        frames = torch.nn.functional.pad(codes, (0, 1))
        mask = torch.ones_like(frames, dtype=torch.bool)
        mask[:, -1] = False
        return frames, mask
