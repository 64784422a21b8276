"""Step 10: write the checkpoint to ship.

    python export.py RUN OUT [--name lm] [--temperature 0.2]

Writes config.json, model.safetensors (bf16 or fp16, with `codec_model.*`), tokenizer.json,
generation_config.json and MODEL_CARD.md to OUT, for CsmForConditionalGeneration.from_pretrained.

The server samples at temperature 0.9 by default, CSM-1B's setting. A model this small needs less,
so both heads are scaled: at 0.9 the exported model samples from the distribution that the trained
one has at --temperature.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CsmForConditionalGeneration, MimiModel

from lm import make_config, make_model
from lm_warm_start import EXPORTED_TEMPERATURE, SERVED_TEMPERATURE
from novels import MAX_PART_CHARS


def load_lm(run: Path, name: str) -> CsmForConditionalGeneration:
    """Loads RUN/NAME.pt and RUN/codec as one model."""
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    codec = MimiModel.from_pretrained(run / "codec").eval()
    model = make_model(make_config(codec.config, tokenizer)).eval()
    saved = torch.load(run / f"{name}.pt", map_location="cpu", weights_only=True)
    state = {
        key.removeprefix("model."): tensor
        for key, tensor in saved["language"].items()
        if key.startswith("model.")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [key for key in missing if not key.startswith("codec_model")]
    assert not lost + unexpected, lost + unexpected
    model.codec_model = codec
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="lm")
    parser.add_argument("--temperature", type=float, default=EXPORTED_TEMPERATURE)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    args = parser.parse_args()
    model = load_lm(args.run, args.name)
    scale = SERVED_TEMPERATURE / args.temperature
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
        model.depth_decoder.codebooks_head.weight.mul_(scale)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    file = args.out / "model.safetensors"
    tensors = load_file(file)
    kind = getattr(torch, args.dtype)
    # Mimi divides embed_sum by cluster_usage: store the quotient, which fp16 then rounds only once.
    for name in [n for n in tensors if n.endswith("codebook.embed_sum")]:
        usage = name.replace("embed_sum", "cluster_usage")
        tensors[name] = (tensors[name] / tensors[usage].clamp(min=1e-5)[:, None]).clamp(-3e4, 3e4)
        tensors[usage] = torch.ones_like(tensors[usage])
    tensors = {n: t.to(kind) if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((args.out / "config.json").read_text())
    config |= {"dtype": args.dtype, "max_part_chars": MAX_PART_CHARS}
    config["codec_config"].pop("_name_or_path", None)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = dict(do_sample=True, temperature=SERVED_TEMPERATURE, top_k=50)
    (args.out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shutil.copy(args.run / "tokenizer.json", args.out / "tokenizer.json")
    shutil.copy(Path(__file__).parent / "MODEL_CARD.md", args.out)
    CsmForConditionalGeneration.from_pretrained(args.out)
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor.float()).all(), name


if __name__ == "__main__":
    main()
