"""CSM-1B's sizes. Needs no kernels."""

from dataclasses import replace

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
