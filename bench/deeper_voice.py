"""Writes the built-in voice with more layers: more work for each frame, the same codes.

    python bench/deeper_voice.py OUT --times 8

Benchmarks of a server use it as a larger model that still speaks: its codes, and so its length, are
the built-in voice's. An added layer repeats the weights of an existing one, except that its
output projections are 0, so it adds 0 to its input.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vox_serve.hub import BUILT_IN_VOICES

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def deepen(weights: dict[str, torch.Tensor], config: dict, times: int) -> None:
    """Multiplies the number of layers of both transformers by `times`, in place."""
    stacks = {"backbone_model": config, "depth_decoder.model": config["depth_decoder_config"]}
    for stack, sizes in stacks.items():
        prefix, layers = f"{stack}.layers.", sizes["num_hidden_layers"]
        for name in [name for name in weights if name.startswith(prefix)]:
            number, _, rest = name.removeprefix(prefix).partition(".")
            added = torch.zeros_like if rest in OUTPUTS else torch.clone
            for copy in range(1, times):
                weights[f"{prefix}{copy * layers + int(number)}.{rest}"] = added(weights[name])
        sizes["num_hidden_layers"] = layers * times


def rewrite(folder: Path, times: int) -> None:
    """Deepens the checkpoint in `folder`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    weights = load_file(folder / "model.safetensors")
    deepen(weights, config, times)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--times", type=int, default=8, help="multiply the layers of both transformers by this"
    )
    args = parser.parse_args()
    shutil.copytree(BUILT_IN_VOICES / "demo", args.out)
    rewrite(args.out, args.times)


if __name__ == "__main__":
    main()
