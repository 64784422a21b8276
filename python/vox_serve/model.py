"""CSM's two transformers, run with voxkern's ops. The model holds weights, but no state."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vox_serve.csm_weights import CsmWeights, TransformerWeights
from vox_serve.kv_cache import CacheBatch, KvCache
from vox_serve.model_config import CsmConfig, TransformerConfig
from vox_serve.sampling import SamplingRows
from voxkern import ops
from voxkern.layers import DepthDecoder, LlamaLayers
from voxkern.persistent import decode_depth_persistent

PERSISTENT_ROWS = 8
"""Maximum batch size of the persistent depth decoder (kDepthRows in cuda/decoder/persistent.cu);
above it, `decode_depth_persistent` falls back to `decode_depth`."""


class _Layer(NamedTuple):
    """One backbone layer's weights: views of the stacked tensors."""

    qkv: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    next_norm: Tensor  # the following layer's attn_norm, or the last norm


class CsmModel:
    """The backbone, which runs once a frame, and the depth decoder, which draws a frame's codes.

    Args:
        config: the model's sizes.
        weights: weights on the device that runs the model, in the dtype of the activations.
    """

    def __init__(self, config: CsmConfig, weights: CsmWeights) -> None:
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
        self._backbone = _llama_layers(weights.backbone, config.backbone)
        self._depth = DepthDecoder(
            **vars(_llama_layers(weights.depth, config.depth)),
            audio_rows=weights.depth_audio_rows,
            projection=weights.projection,
            heads=weights.code_heads,
        )

    def backbone_step(
        self, frames: Tensor, mask: Tensor, batch: CacheBatch, cache: KvCache
    ) -> Tensor:
        """Run the backbone over new frames, and write their keys and values to the cache.

        Args:
            frames: `[T, K + 1]` int64, the new frames of all sequences, concatenated.
            mask: `[T, K + 1]` bool, as in `voxkern.ops.embed_frames`.
            batch: cache locations of the frames.
            cache: keys and values; updated in place.

        Returns:
            `[B, C]`: each sequence's last hidden state, after the last norm.
        """
        x = ops.embed_frames(frames, mask, self.weights.audio_table, self.weights.text_table)
        if batch.cu_seqlens is None:
            return ops.decode_backbone(**self.backbone_arguments(x, batch, cache))
        return self._prefill(x, batch, cache)

    def backbone_arguments(self, x: Tensor, batch: CacheBatch, cache: KvCache) -> dict[str, Any]:
        """Keyword arguments of `voxkern.ops.decode_backbone` for embedded frames x `[B, C]`."""
        return {
            "x": x,
            **vars(self._backbone),
            "positions": batch.positions,
            "slots": batch.slots,
            "k_pages": cache.k_pages,
            "v_pages": cache.v_pages,
            "page_table": batch.page_table,
            "seq_lens": batch.seq_lens,
        }

    def _prefill(self, residual: Tensor, batch: CacheBatch, cache: KvCache) -> Tensor:
        """Run embedded prompt frames `[T, C]` through the layers.

        The last layer writes keys and values of all frames, but needs to attend from each
        sequence's last frame only.

        Returns:
            `[B, C]`: each sequence's last hidden state.
        """
        c = self.config.backbone
        scale = c.head_dim**-0.5
        cu_seqlens = batch.cu_seqlens
        assert cu_seqlens is not None  # only a decoding batch has none
        x = ops.rms_norm(residual, self.weights.backbone.attn_norm[0], c.norm_eps)
        for layer, k_pages, v_pages in zip(self._layers, cache.k_pages, cache.v_pages, strict=True):
            qkv = ops.linear(x, layer.qkv).unflatten(1, (-1, c.head_dim))
            q, k, v = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
            ops.append_kv(
                q, k, v, self._backbone.rope_table, batch.positions, batch.slots, k_pages, v_pages
            )
            if layer is self._layers[-1]:
                q, residual = q[batch.last_tokens], residual[batch.last_tokens]
                cu_seqlens = torch.arange(len(cu_seqlens), dtype=torch.int32, device=self.device)
            x = ops.prefill_attention(
                q, k_pages, v_pages, batch.page_table, cu_seqlens, batch.seq_lens, scale
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
            The drawn codes, `[B, K]` int64; some are -1 in rows whose numbers are not finite.
        """
        code0 = ops.sample_tokens(
            ops.linear(hidden, self.weights.code0_head),
            **_draw_arguments(rows),
            repetition_penalty=rows.repetition_penalty,
            history=rows.history,
            codebook=0,
        )
        decode_depth = decode_depth_persistent if persistent else ops.decode_depth
        return decode_depth(**self.depth_arguments(hidden, code0, rows))

    def depth_arguments(self, hidden: Tensor, code0: Tensor, rows: SamplingRows) -> dict[str, Any]:
        """Keyword arguments of `voxkern.ops.decode_depth`."""
        return {
            "hidden": hidden,
            "code0": code0,
            **vars(self._depth),
            **_draw_arguments(rows),
        }

    def next_inputs(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's input for frames of audio codes.

        Args:
            codes: `[T, K]` int64; negative ones, which were not drawn, are masked.

        Returns:
            Frames `[T, K + 1]` int64 and mask `[T, K + 1]` bool.
        """
        frames = torch.nn.functional.pad(codes, (0, 1))
        mask = frames >= 0
        mask[:, -1] = False
        return frames, mask


def _llama_layers(weights: TransformerWeights, config: TransformerConfig) -> LlamaLayers:
    return LlamaLayers(
        **vars(weights),
        rope_table=config.rope_table().to(weights.norm.device),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        eps=config.norm_eps,
    )


def _draw_arguments(rows: SamplingRows) -> dict[str, Tensor]:
    """The sampling arguments that the draws of all codebooks share."""
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "frames")
    return {name: getattr(rows, name) for name in names}
