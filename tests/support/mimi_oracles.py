"""Small random Mimi models from transformers and moshi, with every part made audible."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TINY = {
    "sampling_rate": 800,
    "hidden_size": 32,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "codebook_size": 64,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": 8,
    "upsample_groups": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "sliding_window": 7,
}


def random_hf_mimi(seed: int = 0, **settings):
    """transformers' MimiModel with random weights, in eval mode.

    Args:
        seed: seed of the weights.
        settings: config fields that override `TINY`.
    """
    with tempfile.TemporaryDirectory() as folder:
        return save_hf_mimi(Path(folder), seed, **settings)


def save_hf_mimi(folder: Path, seed: int = 0, **settings):
    """Save `random_hf_mimi` with transformers to a folder and return the model.

    The weights are redrawn in the file: its tensor names are stable, while the names of
    transformers' modules change between versions.
    """
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(seed)
    MimiModel(MimiConfig(**{**TINY, **settings})).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    _liven(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return MimiModel.from_pretrained(folder).eval()


def random_moshi_mimi(seed: int = 0):
    """moshi's MimiModel in the sizes of `TINY`, with random weights, in eval mode."""
    from moshi.models.loaders import get_mimi

    width, dim = TINY["hidden_size"], TINY["codebook_dim"]
    torch.manual_seed(seed)
    model = get_mimi(
        None,
        {
            "sample_rate": TINY["sampling_rate"],
            "channels": 1,
            "frame_rate": 50,
            "seanet": {
                "channels": 1,
                "dimension": width,
                "causal": True,
                "n_filters": TINY["num_filters"],
                "n_residual_layers": 1,
                "activation": "ELU",
                "compress": 2,
                "dilation_base": 2,
                "kernel_size": 7,
                "residual_kernel_size": 3,
                "last_kernel_size": 3,
                "norm": "none",
                "pad_mode": "constant",
                "ratios": TINY["upsampling_ratios"],
                "true_skip": True,
            },
            "quantizer": {
                "dimension": dim,
                "n_q": TINY["num_quantizers"],
                "bins": TINY["codebook_size"],
                "input_dimension": width,
                "output_dimension": width,
            },
            "transformer": {
                "d_model": width,
                "num_heads": TINY["num_attention_heads"],
                "num_layers": TINY["num_hidden_layers"],
                "causal": True,
                "layer_scale": 0.01,
                "context": TINY["sliding_window"],
                "conv_layout": True,
                "max_period": 10000,
                "gating": "none",
                "norm": "layer_norm",
                "positional_embedding": "rope",
                "dim_feedforward": TINY["intermediate_size"],
                "input_dimension": width,
                "output_dimensions": [width],
            },
        },
        num_codebooks=TINY["num_quantizers"],
    )
    _liven(model.state_dict())
    return model


def moshi_file_tensors(model) -> dict[str, Tensor]:
    """moshi's tensors under the names that its published files use."""
    return {
        name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.", "out_proj."): (
            tensor.contiguous()
        )
        for name, tensor in model.state_dict().items()
    }


def write_json(file: Path, settings: dict) -> None:
    file.write_text(json.dumps(settings), encoding="utf-8")


def random_codes(batch: int, frames: int, codebooks: int = 8, size: int = 64) -> Tensor:
    return torch.randint(0, size, (batch, frames, codebooks))


def hf_decode(model, codes: Tensor) -> Tensor:
    """Args: codes `[B, N, K]`. Returns `[B, S]`."""
    with torch.no_grad():
        return model.decode(codes.transpose(1, 2)).audio_values[:, 0]


def hf_encode(model, audio: Tensor, num_codebooks: int | None = None) -> Tensor:
    """Args: audio `[B, S]`. Returns codes `[B, N, K]`."""
    with torch.no_grad():
        codes = model.encode(audio[:, None], num_quantizers=num_codebooks).audio_codes
    return codes.transpose(1, 2)


def assert_same_audio(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The largest error is at most `tolerance` times the loudest sample or 1, whichever is more."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), error


def _liven(tensors: dict[str, Tensor]) -> None:
    """Redraw weights whose initial values (layer scales, codebooks) would mute the transformers.

    Args:
        tensors: by their names in a file of either library; changed in place.
    """
    for name, tensor in tensors.items():
        if "layer_scale" in name:
            tensor.uniform_(0.2, 0.8)
        elif "norm" in name and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            tensor.uniform_(-0.3, 0.3)
        elif name.endswith(("embed_sum", "embedding_sum")):
            tensor.normal_()
            tensor[-1] *= 1e-6
        elif name.endswith("cluster_usage"):
            tensor.uniform_(0.5, 2.0)
            tensor[-1] = 1e-9  # below the floor that the division clamps to
        elif name.endswith("initialized"):
            tensor.fill_(1.0)
