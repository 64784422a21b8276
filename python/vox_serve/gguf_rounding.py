"""Measures what rounding a GGUF file's rounded weights once more, to our formats, changes."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from vox_serve.checkpoint import CODEC_PREFIX
from vox_serve.csm_weights import CsmWeights
from vox_serve.gguf_tensors import GgufTensors
from vox_serve.model_config import CsmConfig
from vox_serve.tensor_names import TensorNames
from voxkern.quantize import BLOCK_ROWS, format_of, unpack

SAMPLE_ROWS = 64
"""Rows of each matrix that are compared."""


def second_rounding(
    tensors: GgufTensors, names: TensorNames, config: CsmConfig, weights: CsmWeights
) -> dict[str, float]:
    """The error of weights that were made from a file's blocks, by their format in memory.

    Args:
        tensors: the file's.
        names: their format.
        config: the sizes.
        weights: made from them.

    Returns:
        For "int8", "int4" or a dtype's name: the root mean square of the differences to the
        dequantised values, relative to that of the values. float32, which keeps them, and formats
        that hold none are left out.
    """
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    rounded = set(tensors.rounded)
    for name, weight, first in _matrices(names, config, weights):
        if name not in rounded or weight.dtype == torch.float32:
            continue
        values = tensors.rows(name, 0, min(SAMPLE_ROWS, math.prod(tensors.shapes[name][:-1])))
        format = format_of(weight)
        if format == "none":
            format = str(weight.dtype).removeprefix("torch.")
        error = _rows(weight, first, len(values)) - values
        squares[format][0] += error.double().square().sum().item()
        squares[format][1] += values.double().square().sum().item()
    return {f: math.sqrt(error / all) if all else 0.0 for f, (error, all) in squares.items()}


def rounding_line(tensors: GgufTensors, errors: dict[str, float]) -> str | None:
    """One line for people about `second_rounding`; None if nothing was rounded again."""
    if not errors:
        return None
    model = [name for name in tensors.rounded if not name.startswith(CODEC_PREFIX)]
    types = Counter(tensors.type_of(name) for name in model)
    kinds = ", ".join(kind.lower() for kind, _ in types.most_common())
    parts = ", ".join(
        f"to {format} by {100 * error:.2g} %" if error else f"to {format} without error"
        for format, error in sorted(errors.items())
    )
    return (
        f"{tensors.path.name}: weights in {kinds} were rounded once more, {parts} (root mean "
        f"square of the change, relative to the weights; {SAMPLE_ROWS} rows of each matrix)"
    )


def _matrices(
    names: TensorNames, config: CsmConfig, weights: CsmWeights
) -> Iterator[tuple[str, Tensor, int]]:
    """Tensors whose rows are in the file's order: the name, the weight that holds it, and its first
    row there. Those of q and k may be in another order."""
    for prefix, sizes, part in (
        (names.backbone, config.backbone, weights.backbone),
        (names.depth, config.depth, weights.depth),
    ):
        value_row = (sizes.num_heads + sizes.num_kv_heads) * sizes.head_dim
        for i in range(sizes.num_layers):
            for key, stacked, first in (
                ("v", part.qkv, value_row),
                ("o", part.o, 0),
                ("gate", part.gate_up, 0),
                ("up", part.gate_up, sizes.ffn_dim),
                ("down", part.down, 0),
            ):
                yield f"{prefix}layers.{i}.{names.layer[key]}", stacked[i], first
    yield names.text_table, weights.text_table, 0
    yield names.audio_table, weights.audio_table, 0
    yield names.code0_head, weights.code0_head, 0
    yield names.projection, weights.projection, 0


def _rows(weight: Tensor, first: int, count: int) -> Tensor:
    """Rows of a plain or packed weight: float32 on the CPU."""
    if format_of(weight) == "none":
        return weight[first : first + count].cpu().float()
    start = first // BLOCK_ROWS
    end = -(-(first + count) // BLOCK_ROWS)
    first -= start * BLOCK_ROWS
    return unpack(weight[start:end].cpu())[first : first + count].to(torch.float32)
