"""Prefill: the backbone over inputs that are known."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache, copy_to_device
from vox_serve.model import CsmModel
from vox_serve.request import Prompt


class Part(NamedTuple):
    """The next `length` positions of a sequence, of which all inputs are known."""

    inputs: Prompt
    sequence: CacheSequence
    length: int


def prefill(model: CsmModel, cache: KvCache, parts: Sequence[Part]) -> Tensor:
    """Write positions of sequences to the cache, which has pages for them or takes some.

    Returns:
        `[B, C]`: the hidden state after each part, on the model's device.
    """
    known = [
        (part.inputs, slice(part.sequence.length, part.sequence.length + part.length))
        for part in parts
    ]
    frames = torch.cat([inputs.frames[positions] for inputs, positions in known])
    mask = torch.cat([inputs.mask[positions] for inputs, positions in known])
    batch = CacheBatch.prefill(cache, [p.sequence for p in parts], [p.length for p in parts])
    frames, mask = (copy_to_device(tensor, model.device) for tensor in (frames, mask))
    return model.backbone_step(frames, mask, batch, cache)
