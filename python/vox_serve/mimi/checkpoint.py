"""Codec checkpoints: finding the file, converting moshi's names, inferring sizes from shapes."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vox_serve.checkpoint import check_header, refuse_not_finite
from vox_serve.json_file import read_json_file
from vox_serve.mimi.codec import Mimi
from vox_serve.mimi.config import MimiConfig

_MOSHI_TO_HF = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(encoder|decoder)\.model\.", r"\1.layers."),
        (r"^(encoder_transformer|decoder_transformer)\.transformer\.", r"\1."),
        (r"\.(?:conv|convtr)(?:\.(?:conv|convtr))+\.", ".conv."),
        (r"\.self_attn\.(?:in_proj_weight|in_projs\.0\.weight)$", ".self_attn.in_proj.weight"),
        (r"\.self_attn\.(?:out_proj|out_projs\.0)\.", ".self_attn.o_proj."),
        (r"\.norm1\.", ".input_layernorm."),
        (r"\.norm2\.", ".post_attention_layernorm."),
        (r"\.linear1\.", ".mlp.fc1."),
        (r"\.linear2\.", ".mlp.fc2."),
        (r"\.layer_scale_1\.", ".self_attn_layer_scale."),
        (r"\.layer_scale_2\.", ".mlp_layer_scale."),
        (r"^quantizer\.rvq_first\.", "quantizer.semantic_residual_vector_quantizer."),
        (r"^quantizer\.rvq_rest\.", "quantizer.acoustic_residual_vector_quantizer."),
        (r"\.vq\.layers\.(\d+)\._codebook\.", r".layers.\1.codebook."),
        (r"\.codebook\._initialized$", ".codebook.initialized"),
        (r"\.codebook\.embedding_sum$", ".codebook.embed_sum"),
    )
]


def load_mimi(
    path: str | Path, precision: str = "float32", device: torch.device | str = "cpu"
) -> Mimi:
    """Load a codec from a safetensors file with transformers' or moshi's names, or from its folder.

    Sizes come from a `config.json` next to the file, if that describes a Mimi or a CSM with its
    codec; otherwise from the tensors' shapes.

    Args:
        path: the file, or a folder (see `find_codec_file`).
        precision: precision of the decoder's matrices, as in `Mimi`.
        device: device that the codec computes on.

    Raises:
        FileNotFoundError: the file or folder does not exist, or the folder has no codec.
        ValueError: the file is not safetensors, or a tensor in it is missing, has a wrong shape or
            holds NaN or infinity.
    """
    path = Path(path)
    file = find_codec_file(path) if path.is_dir() else path
    if file is None:
        raise FileNotFoundError(
            f"no Mimi codec in {path}: expected mimi.safetensors, tokenizer-*.safetensors, or"
            " model.safetensors next to the config.json of a Mimi"
        )
    if not file.is_file():
        raise FileNotFoundError(f"no such Mimi checkpoint: {file}")
    try:
        check_header(file)
        tensors = load_file(file)
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            refuse_not_finite(name, tensor, file)
    return mimi_from_checkpoint(tensors, _codec_settings(file.parent), precision, device)


def mimi_from_checkpoint(
    codec_tensors: Mapping[str, Tensor],
    codec_config: Mapping[str, Any] | None,
    precision: str = "float32",
    device: torch.device | str = "cpu",
) -> Mimi:
    """Build a codec from tensors with transformers' or moshi's names.

    Args:
        codec_tensors: by name, without a prefix such as `codec_model.`.
        codec_config: settings as in transformers' `MimiConfig`. None infers the sizes from the
            tensors, and takes those that shapes do not determine (8 heads, the window, the RoPE
            base) from `kyutai/mimi`.
        precision: precision of the decoder's matrices, as in `Mimi`.
        device: device that the codec computes on.

    Raises:
        ValueError: the config is unsupported, or a tensor is missing or has a wrong shape.
    """
    tensors = {_hf_name(name): tensor.to(device) for name, tensor in codec_tensors.items()}
    if codec_config is None:
        config = _config_from_shapes({name: tuple(t.shape) for name, t in tensors.items()})
    else:
        config = MimiConfig.from_json(codec_config)
    return Mimi(config, _split_in_proj(tensors, config), precision)


def find_codec_file(folder: str | Path) -> Path | None:
    """The codec's safetensors file in a folder, or None.

    The first that exists: `mimi.safetensors`, `tokenizer-*.safetensors` (moshi's name),
    `model.safetensors` if the `config.json` next to it describes a Mimi (in a CSM folder that file
    is the CSM).
    """
    folder = Path(folder)
    candidates = [folder / "mimi.safetensors", *sorted(folder.glob("tokenizer-*.safetensors"))]
    if _read_json(folder / "config.json").get("model_type") == "mimi":
        candidates.append(folder / "model.safetensors")
    return next((file for file in candidates if file.is_file()), None)


def _codec_settings(folder: Path) -> dict[str, Any] | None:
    settings = _read_json(folder / "config.json")
    return settings if settings.get("model_type") == "mimi" else settings.get("codec_config")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        settings = read_json_file(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    return settings if isinstance(settings, dict) else {}


def _hf_name(name: str) -> str:
    for pattern, replacement in _MOSHI_TO_HF:
        name = pattern.sub(replacement, name)
    return name


def _split_in_proj(tensors: Mapping[str, Tensor], config: MimiConfig) -> dict[str, Tensor]:
    """Split moshi's fused projection into q, k and v in HF's layout (half-split rotary pairs)."""
    split = {}
    for name, tensor in tensors.items():
        if not name.endswith(".self_attn.in_proj.weight"):
            split[name] = tensor
            continue
        heads = config.num_attention_heads
        if tensor.shape[0] != 3 * heads * config.head_dim:
            raise ValueError(
                f"Mimi checkpoint: tensor {name} has {tensor.shape[0]} rows, expected 3 x"
                f" {heads} heads of {config.head_dim}"
            )
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            if letter != "v":
                part = part.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            split[name.replace("in_proj", f"{letter}_proj")] = part
    return split


def codec_settings(shapes: Mapping[str, tuple[int, ...]], num_heads: int) -> dict[str, Any]:
    """Settings as in transformers' `MimiConfig`, inferred from shapes and the number of heads.

    Args:
        shapes: of tensors with transformers' names.
        num_heads: heads of the two transformers, which shapes do not determine.

    Raises:
        ValueError: a tensor is missing, or a size is unsupported.
    """
    settings = vars(_config_from_shapes(shapes, num_heads)).copy()
    settings["sampling_rate"] = settings.pop("sample_rate_hz")
    settings["frame_rate"] = settings.pop("frame_rate_hz")
    settings["vector_quantization_hidden_dimension"] = settings["codebook_dim"]
    settings["upsampling_ratios"] = list(settings["upsampling_ratios"])
    if not settings.pop("has_encoder"):
        settings["encoder_config"] = None
    return settings


def _config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], heads: int = MimiConfig.num_attention_heads
) -> MimiConfig:
    try:
        return _inferred(shapes, heads)
    except (LookupError, ArithmeticError):
        raise ValueError("Mimi checkpoint: its tensors do not have the shapes of a Mimi") from None


def _inferred(shapes: Mapping[str, tuple[int, ...]], heads: int) -> MimiConfig:
    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"Mimi checkpoint: tensor {name} is missing")
        return shapes[name]

    def count(prefix: str) -> int:
        found = {re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in shapes}
        return len({match[1] for match in found if match})

    convs: list[int] = []
    units: list[int] = []
    for name in shapes:
        if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(block\.1\.)?conv\.weight", name):
            (units if match[2] else convs).append(int(match[1]))
    first = shape("decoder.layers.0.conv.weight")
    _, *ups, last = [shape(f"decoder.layers.{i}.conv.weight") for i in sorted(convs)]
    if not ups:
        raise ValueError("Mimi checkpoint: tensor decoder.layers.2.conv.weight is missing")
    sizes: dict[str, Any] = {
        "hidden_size": first[1],
        "kernel_size": first[2],
        "num_filters": last[1],
        "last_kernel_size": last[2],
        "upsampling_ratios": tuple(up[2] // 2 for up in ups),
        "num_residual_layers": len(units) // len(ups),
        "use_conv_shortcut": any(".shortcut." in name for name in shapes),
        "num_hidden_layers": count("decoder_transformer.layers."),
        "has_encoder": any(name.startswith("encoder.") for name in shapes),
    }
    if units:
        unit = shape(f"decoder.layers.{min(units)}.block.1.conv.weight")
        sizes |= {"compress": unit[1] // unit[0], "residual_kernel_size": unit[2]}
    if sizes["num_hidden_layers"]:
        layer = "decoder_transformer.layers.0."
        fused = shapes.get(f"{layer}self_attn.in_proj.weight")
        rows = fused[0] // 3 if fused else shape(f"{layer}self_attn.q_proj.weight")[0]
        kv_rows = rows if fused else shape(f"{layer}self_attn.k_proj.weight")[0]
        sizes |= {
            "num_attention_heads": heads,
            "intermediate_size": shape(f"{layer}mlp.fc1.weight")[0],
            "head_dim": rows // heads,
            "num_key_value_heads": kv_rows * heads // rows,
            "attention_bias": f"{layer}self_attn.q_proj.bias" in shapes,
        }
    chains = {
        kind: f"quantizer.{kind}_residual_vector_quantizer.layers."
        for kind in ("semantic", "acoustic")
    }
    size, dim = shape(f"{chains['semantic']}0.codebook.embed_sum")
    semantic, acoustic = map(count, chains.values())
    sizes |= {
        "codebook_size": size,
        "codebook_dim": dim,
        "num_semantic_quantizers": semantic,
        "num_quantizers": semantic + acoustic,
    }
    steps_hz = math.ceil(MimiConfig.sample_rate_hz / math.prod(sizes["upsampling_ratios"]))
    upsample = shapes.get("upsample.conv.weight")
    if upsample is None:
        sizes["frame_rate_hz"] = float(steps_hz)
    else:
        sizes["upsample_groups"] = first[1] // upsample[1]
        if (stride := upsample[2] // 2) != 2:
            # Rounded down, so that the division in `latent_stride` does not yield less than stride.
            sizes["frame_rate_hz"] = math.nextafter(steps_hz / stride, 0.0)
    return MimiConfig(**sizes)
