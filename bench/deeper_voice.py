"""Writes the built-in voice with more layers: more work for each frame, the same codes.

    python bench/deeper_voice.py OUT --times 8

It stands for a larger model in benchmarks of a server: what it says is speech, and it ends where
the built-in voice ends. An added layer repeats the weights of an existing one, except that its
output projections are 0, so it adds 0 to its input.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vox_serve.hub import BUILT_IN_VOICES

STACKS = {"backbone_model": (), "depth_decoder.model": ("depth_decoder_config",)}  # sizes: where
OUTPUTS = (".self_attn.o_proj.weight", ".mlp.down_proj.weight")


def deepen(weights: dict[str, torch.Tensor], config: dict, times: int) -> None:
    """Adds layers to a checkpoint, in place: `times` as many in both transformers."""
    for stack, path in STACKS.items():
        sizes = config
        for key in path:
            sizes = sizes[key]
        layers = sizes["num_hidden_layers"]
        for name in [name for name in weights if name.startswith(f"{stack}.layers.")]:
            number, _, rest = name.removeprefix(f"{stack}.layers.").partition(".")
            is_output = f".{rest}" in OUTPUTS
            weight = torch.zeros_like(weights[name]) if is_output else weights[name]
            for copy in range(1, times):
                place = copy * layers + int(number)
                weights[f"{stack}.layers.{place}.{rest}"] = weight.clone()
        sizes["num_hidden_layers"] = layers * times


def rewrite(folder: Path, times: int) -> None:
    """Deepens the checkpoint in `folder`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    weights = load_file(folder / "model.safetensors")
    deepen(weights, config, times)
    save_file(weights, folder / "model.safetensors")
    path.write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=8)
    args = parser.parse_args()
    shutil.copytree(BUILT_IN_VOICES / "demo", args.out)
    rewrite(args.out, args.times)


if __name__ == "__main__":
    main()
