"""Mimi, CSM's neural audio codec: audio to codes and back."""

from vox_serve.mimi.checkpoint import find_codec_file, load_mimi, mimi_from_checkpoint
from vox_serve.mimi.codec import Mimi
from vox_serve.mimi.config import MimiConfig
from vox_serve.mimi.state import StreamState as MimiState

__all__ = [
    "Mimi",
    "MimiConfig",
    "MimiState",
    "find_codec_file",
    "load_mimi",
    "mimi_from_checkpoint",
]
