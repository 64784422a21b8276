"""CSM-1B's sizes and the bytes that one of its frames reads. Needs no kernels."""

from dataclasses import dataclass, replace

from torch import Tensor

from vox_serve.csm_weights import CsmWeights, TransformerWeights
from vox_serve.model_config import CsmConfig

CACHED = 128
"""Positions in the backbone's cache when a frame is timed."""
FRAME_MS = 80.0
TEXT_ROWS = 1024
"""Text rows to allocate out of a vocabulary of 128256: a frame reads none of them."""
CSM_1B = {
    "backbone_flavor": "llama-1B",
    "decoder_flavor": "llama-100M",
    "text_vocab_size": 128256,
    "audio_vocab_size": 2051,
    "audio_num_codebooks": 32,
}


def config_for(rehearse: bool) -> CsmConfig:
    """CSM-1B; for a rehearsal, a tiny model of the same structure."""
    config = CsmConfig.from_json(CSM_1B)
    if not rehearse:
        return config
    backbone = replace(config.backbone, num_layers=2, dim=256, num_heads=4, num_kv_heads=1)
    depth = replace(config.depth, num_layers=1, dim=128, num_heads=2, num_kv_heads=1, head_dim=64)
    return CsmConfig(
        replace(backbone, ffn_dim=128), replace(depth, ffn_dim=128), 32, 2051, TEXT_ROWS
    )


@dataclass(frozen=True)
class FrameBytes:
    """Weight bytes read for one frame at batch 1.

    Attributes:
        once: bytes read once: the backbone, the projection of its hidden state, and the heads
            (each codebook has its own).
        step: bytes read in every step of the depth decoder.
        steps: number of those steps.
    """

    once: int
    step: int
    steps: int

    @property
    def total(self) -> int:
        return self.once + self.steps * self.step

    def from_memory(self, cache_bytes: int) -> int:
        """Bytes read from memory if a cache of that size keeps all it can between steps."""
        return self.once + self.step + (self.steps - 1) * max(0, self.step - cache_bytes)


def frame_bytes(weights: CsmWeights) -> FrameBytes:
    """The backbone once, the depth decoder K - 1 times.

    The inputs of the depth decoder's first two positions are known at once, so both share a step.
    """
    once = transformer_bytes(weights.backbone)
    once += num_tensor_bytes([weights.code0_head, weights.projection, weights.code_heads])
    return FrameBytes(once, transformer_bytes(weights.depth), len(weights.code_heads))


def transformer_bytes(t: TransformerWeights) -> int:
    """Weight bytes read in one pass through a transformer's layers."""
    return num_tensor_bytes([t.attn_norm, t.qkv, t.o, t.mlp_norm, t.gate_up, t.down, t.norm])


def num_tensor_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
