"""Checks config.json's sizes against the tensors in the files, before anything is allocated."""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from vox_serve.checkpoint import CODEC_PREFIX, CheckpointError, TensorFiles
from vox_serve.model_config import CsmConfig, TransformerConfig
from vox_serve.tensor_names import TensorNames


def check_sizes(
    files: TensorFiles, names: TensorNames, config: CsmConfig, settings: Mapping[str, Any]
) -> None:
    """Check that config.json and the tensors' shapes agree.

    After that, the weights in memory have as many elements as the tensors in the files.

    Args:
        files: the checkpoint's files.
        names: their format.
        config: the sizes, which determine every shape.
        settings: config.json, parsed.

    Raises:
        CheckpointError: they do not. One line names the key of config.json if a size in it differs
            from the tensors', else the tensor.
    """
    _refuse_unknown(files, names, config)
    for key, value, found in _sizes(files, names, config):
        if found is not None and value != found:
            given = "" if _is_given(settings, key) else " (by default)"
            raise CheckpointError(
                f"config.json: {key} is {value}{given}, but the tensors in {files.paths[0]} have "
                f"{found}"
            )
    for name, shape in _shapes(files, names, config):
        if name not in files:
            _refuse_missing(files, names, name, shape)
        files.check(name, shape)


def _refuse_missing(
    files: TensorFiles, names: TensorNames, name: str, shape: tuple[int, ...]
) -> NoReturn:
    """Name a tensor that is missing, and one of no other use that has its shape."""
    known = {*names.marks, names.audio_table, names.depth_audio_table}
    parts = (f"{names.backbone}layers.", f"{names.depth}layers.", CODEC_PREFIX)
    others = [other for other in sorted(files.names - known) if not other.startswith(parts)]
    alike = next((other for other in others if files.shape(other) == shape), None)
    hint = f"; if {alike}, which has its shape, is the same, rename it" if alike else ""
    raise CheckpointError(f"tensor {name} is missing in {files.paths[0]}{hint}")


def _is_given(settings: Mapping[str, Any], key: str) -> bool:
    part: Any = settings
    for name in key.split("."):
        part = part.get(name) if isinstance(part, Mapping) else None
    return part is not None


def _sizes(
    files: TensorFiles, names: TensorNames, config: CsmConfig
) -> Iterator[tuple[str, int, int | None]]:
    """Keys of config.json, their values, and the values that the shapes imply; None if they imply
    none, or not a whole number."""

    def size(name: str, axis: int) -> int | None:
        shape = files.shape(name)
        return shape[axis] if shape is not None and len(shape) > axis else None

    yield "text_vocab_size", config.text_vocab_size, size(names.text_table, 0)
    yield "hidden_size", config.backbone.dim, size(names.text_table, 1)
    yield "vocab_size", config.audio_vocab_size, size(names.code0_head, 0)
    heads = size(names.code_heads, 0)
    yield "num_codebooks", config.num_codebooks, None if heads is None else heads + 1
    yield "depth_decoder_config.hidden_size", config.depth.dim, size(names.projection, 0)
    for where, prefix, part in (
        ("", names.backbone, config.backbone),
        ("depth_decoder_config.", names.depth, config.depth),
    ):
        count = _count_layers(files, f"{prefix}layers.")
        # Fewer layers than in the files are refused too, with the tensor's name.
        if count and part.num_layers > count:
            yield f"{where}num_hidden_layers", part.num_layers, count
        layer = {key: f"{prefix}layers.0.{name}" for key, name in names.layer.items()}
        yield f"{where}intermediate_size", part.ffn_dim, size(layer["gate"], 0)
        q_rows, kv_rows = size(layer["q"], 0), size(layer["k"], 0)
        if q_rows is None or kv_rows is None or not q_rows or not kv_rows:
            continue
        if q_rows * part.num_kv_heads == kv_rows * part.num_heads:  # then it is the width
            yield f"{where}head_dim", part.head_dim, _divided(q_rows, part.num_heads)
        elif q_rows == part.num_heads * part.head_dim:
            found = _divided(kv_rows, part.head_dim)
            yield f"{where}num_key_value_heads", part.num_kv_heads, found
        elif kv_rows == part.num_kv_heads * part.head_dim:
            found = _divided(q_rows, part.head_dim)
            yield f"{where}num_attention_heads", part.num_heads, found


def _divided(rows: int, parts: int) -> int | None:
    return rows // parts if rows % parts == 0 else None


def _count_layers(files: TensorFiles, prefix: str) -> int:
    """The number of layers by the highest index in the tensors' names."""
    indices = (name.removeprefix(prefix).partition(".")[0] for name in files.names_below(prefix))
    return max((int(index) + 1 for index in indices if _is_index(index)), default=0)


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _refuse_unknown(files: TensorFiles, names: TensorNames, config: CsmConfig) -> None:
    """Refuse biases and extra layers: leaving them out would silently give wrong speech."""
    known = set(names.layer.values())
    for prefix, sizes in ((names.backbone, config.backbone), (names.depth, config.depth)):
        layers = f"{prefix}layers."
        for name in sorted(files.names_below(layers)):
            index, _, rest = name.removeprefix(layers).partition(".")
            if name.endswith("rotary_emb.inv_freq"):
                continue
            is_known = rest in known and _is_index(index) and index == str(int(index))
            if not is_known or int(index) >= sizes.num_layers:
                raise CheckpointError(f"tensor {name} does not fit config.json ({files.paths[0]})")


def _shapes(
    files: TensorFiles, names: TensorNames, config: CsmConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that are read, and their shapes by config.json."""
    codes, dim, depth_dim = config.audio_vocab_size, config.backbone.dim, config.depth.dim
    yield names.text_table, (config.text_vocab_size, dim)
    yield names.projection, (depth_dim, dim)
    tables = sorted({names.audio_table, names.depth_audio_table})
    found = [name for name in tables if name in files]  # a file has one or both
    if not found:
        raise CheckpointError(f"tensor {' or '.join(tables)} is missing in {files.paths[0]}")
    for name in found:
        yield name, (config.num_codebooks * codes, dim)
    for prefix, part in ((names.backbone, config.backbone), (names.depth, config.depth)):
        layer = _layer_shapes(part)
        for i in range(part.num_layers):
            for key, name in names.layer.items():
                yield f"{prefix}layers.{i}.{name}", layer[key]
        yield f"{prefix}{names.norm}", (part.dim,)
    yield names.code0_head, (codes, dim)
    yield names.code_heads, (config.num_codebooks - 1, depth_dim, codes)


def _layer_shapes(part: TransformerConfig) -> dict[str, tuple[int, ...]]:
    dim, ffn = part.dim, part.ffn_dim
    q_rows, kv_rows = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
    return {
        "attn_norm": (dim,),
        "q": (q_rows, dim),
        "k": (kv_rows, dim),
        "v": (kv_rows, dim),
        "o": (dim, q_rows),
        "mlp_norm": (dim,),
        "gate": (ffn, dim),
        "up": (ffn, dim),
        "down": (dim, ffn),
    }
