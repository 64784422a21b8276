"""Sizes of the published models. Needs no kernels."""

from dataclasses import replace

import torch

from vox_serve.csm_weights import CsmWeights
from vox_serve.frame_bytes import num_tensor_bytes
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
MISO_8B = {**CSM_1B, "backbone_flavor": "llama-8B", "decoder_flavor": "llama-300M"}
SHAPES = {"csm-1b": CSM_1B, "miso-8b": MISO_8B}


def config_for(rehearse: bool, shape: str = "csm-1b") -> CsmConfig:
    """The model of a name in `SHAPES`; for a rehearsal, a tiny one of CSM-1B's structure.

    MisoTTS has `TEXT_ROWS` text rows here: all would take 1 GiB in bfloat16.
    """
    config = CsmConfig.from_json(SHAPES[shape])
    if not rehearse:
        return config if shape == "csm-1b" else replace(config, text_vocab_size=TEXT_ROWS)
    backbone = replace(config.backbone, num_layers=2, dim=256, num_heads=4, num_kv_heads=1)
    depth = replace(config.depth, num_layers=1, dim=128, num_heads=2, num_kv_heads=1, head_dim=64)
    return CsmConfig(
        replace(backbone, ffn_dim=128), replace(depth, ffn_dim=128), 32, 2051, TEXT_ROWS
    )


def weight_bytes(config: CsmConfig, dtype: torch.dtype, quantize: str) -> int:
    """Bytes of all weights in memory, with all text rows."""
    whole = replace(config, text_vocab_size=CSM_1B["text_vocab_size"])
    weights = CsmWeights.empty(whole, dtype, "meta", quantize)
    return num_tensor_bytes(list(weights.named().values()))
