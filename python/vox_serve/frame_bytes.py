"""The bytes of weights that one frame reads, and that a model takes in memory."""

from dataclasses import dataclass

from torch import Tensor

from vox_serve.csm_weights import CsmWeights, TransformerWeights


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
