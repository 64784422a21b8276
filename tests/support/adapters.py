"""LoRA adapters of tiny models, written and merged by peft."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import TinyCsm

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TABLES = r"(embed_text_tokens|.*\.embed_audio_tokens|depth_decoder\.model\.embed_tokens)"


def write_adapter(
    tiny: TinyCsm,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    save_embedding_layers: bool = False,
    **settings,
) -> Path:
    """Write a random adapter as peft saves it. As after training, the codec's product is zero.

    Args:
        tiny: the base model.
        folder: created if missing.
        dtype: dtype of the tensors in the file.
        save_embedding_layers: save the base model's head of codebook 0 and audio table too.
        settings: of peft's `LoraConfig`.

    Returns:
        `folder`.
    """
    peft = pytest.importorskip("peft", reason="no peft to make an adapter with")
    settings = {"r": 4, "target_modules": LINEAR, "init_lora_weights": False} | settings
    model = peft.get_peft_model(copy.deepcopy(tiny.model), peft.LoraConfig(**settings))
    for name, tensor in model.named_parameters():
        if "codec_model" in name and "lora_B" in name:
            tensor.data.zero_()
        elif "modules_to_save" in name:
            tensor.data += 0.05 * torch.randn_like(tensor)
    model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    path = Path(folder) / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return Path(folder)


def merged_tiny(tiny: TinyCsm, folder: Path, dtype: torch.dtype = torch.float32) -> TinyCsm:
    """A model with an adapter, merged by peft; `dtype` is that of the base model."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(tiny.model).to(dtype), folder)
    merged = model.merge_and_unload().eval().requires_grad_(False)
    state = merged.state_dict()
    csm = {name: state.get(name, tensor) for name, tensor in tiny.tensors.items()}
    codec = {n: t for n, t in tiny.tensors.items() if n.startswith("codec_model.")}
    return replace(tiny, model=merged, tensors=csm | codec)


def edit_config(folder: Path, **settings) -> None:
    """Change settings of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_tensors(folder: Path, change) -> None:
    """Replace the tensors of adapter_model.safetensors by `change` of them."""
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
