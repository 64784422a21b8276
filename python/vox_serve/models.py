"""Tell what a model is and what this machine can do with it, before anything is loaded.

python -m vox_serve.models inspect csm-1b-q8_0.gguf
python -m vox_serve.models inspect sesame/csm-1b --json
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vox_serve.cli import CommandParser, one_line, run_command
from vox_serve.console import standard_streams
from vox_serve.json_file import refuse_special

if TYPE_CHECKING:
    from vox_serve.inspected_files import ModelPlace
    from vox_serve.inspection import Inspection
    from vox_serve.model_config import TransformerConfig
    from vox_serve.model_costs import Cost, Machine

PROG = "models"
_INSPECTED = ("*.json", "*.safetensors", "*.gguf", "*.pt", "*.pth", "*.bin", "prompts/*.wav")
"""Files of a repository that tell what it is."""


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        PROG,
        description="Tell what a model is, what it lacks, and what this machine can do with it. "
        "Only config.json and the headers of the weight files are read, on the hub too.",
        usage="vox-serve models inspect MODEL [--json] [--device cpu|cuda] [--bandwidth GB]",
    )
    parser.add_argument("action", choices=("inspect",), help="what to do")
    parser.add_argument(
        "model", help="built-in voice, local folder or file, or hub id, also with :FILE of GGUF"
    )
    parser.add_flag("json", action="store_true", help="write one JSON object")
    parser.add_flag(
        "device", choices=("auto", "cpu", "cuda"), default="auto", help="[default auto]"
    )
    parser.add_flag(
        "bandwidth",
        type=_positive,
        metavar="GB",
        help="gigabytes that the device reads from memory in a second [default: measured]",
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError
    return value


@standard_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 1 if launch cannot load it as it is."""
    parser = make_parser()
    args = parser.parse_args(argv)

    def command() -> int:
        from vox_serve.inspection import inspect_model
        from vox_serve.loading import choose_device
        from vox_serve.model_costs import Machine, costs

        found = inspect_model(_place(args.model))
        machine, table = None, []
        if found.config is not None:
            device = choose_device() if args.device == "auto" else args.device
            speed = None if args.bandwidth is None else args.bandwidth * 1e9
            machine = Machine.here(device, speed)
            table = costs(found.config, machine)
            if not any(cost.fits for cost in table):
                found.problems.append("this machine has too little memory for any precision")
        if args.json:
            print(json.dumps(_as_json(found, machine, table)))
        else:
            for line in _lines(found, machine, table):
                print(line)
        return int(bool(found.problems))

    return run_command(PROG, command)


class _LocalPlace:
    """A local folder, or one file in it."""

    def __init__(self, path: Path, name: str):
        self.name = name
        self.path: Path | None = path
        self._folder = path if path.is_dir() else path.parent
        self.file = None if path.is_dir() else path.name
        prompts = [path for path in self._folder.glob("prompts/*.wav") if path.is_file()]
        # Whatever is no file is listed too: launch finds it by its name, and cannot read it.
        self.sizes: dict[str, int | None] = {
            path.relative_to(self._folder).as_posix(): path.stat().st_size
            if path.is_file()
            else None
            for path in sorted([*self._folder.iterdir(), *prompts])
        }

    def open(self, name: str) -> IO[bytes]:
        refuse_special(self._folder / name)
        return open(self._folder / name, "rb")


class _HubPlace:
    """A repository on the hub, of which only the bytes that are read are downloaded."""

    def __init__(self, name: str):
        from vox_serve.hub import GGUF_SUFFIX, choose_gguf, open_repository

        self.name = name
        self.path: Path | None = None
        self._hub, wanted = open_repository(name)
        self.sizes = self._hub.sizes(_INSPECTED)
        ggufs = [file for file in self.sizes if file.endswith(GGUF_SUFFIX)]
        self.file = choose_gguf(self._hub.repo, ggufs, wanted) if wanted else None

    def open(self, name: str) -> IO[bytes]:
        return self._hub.open(name)


def _place(name: str) -> "ModelPlace":
    from vox_serve.hub import local_model

    path = local_model(name)
    return _HubPlace(name) if path is None else _LocalPlace(path, name)


def _as_json(
    found: "Inspection", machine: "Machine | None", table: "list[Cost]"
) -> dict[str, object]:
    from dataclasses import asdict

    from vox_serve.model_costs import FRAMES_PER_S

    return found.as_json() | {
        "machine": None if machine is None else asdict(machine),
        "frames_per_s_of_real_time": FRAMES_PER_S,
        "precisions": [cost.as_json() for cost in table],
    }


def _lines(found: "Inspection", machine: "Machine | None", table: "list[Cost]") -> list[str]:
    """The report for people."""
    lines = [one_line(f"{found.name}: {found.what}")]
    if found.config is not None:
        config = found.config
        lines += [
            f"  backbone: {_shape(config.backbone)}; {config.backbone.max_positions} positions",
            f"  depth decoder: {_shape(config.depth)}",
            f"  {config.num_codebooks} codebooks of {config.audio_vocab_size} codes, "
            f"{config.text_vocab_size} text tokens",
        ]
    for what, stored in (("weights", found.stored), ("codec's weights", found.codec_stored)):
        if stored:
            parts = ", ".join(f"{kind} {_size(count)}" for kind, count in stored.items())
            lines.append(f"  {what} in the files: {one_line(parts)}")
    given = {**(found.adapter or {}), "tokenizer": found.tokenizer, "codec": found.codec}
    lines += [f"  {one_line(f'{key}: {value}')}" for key, value in given.items() if value]
    lines += [f"  note: {one_line(note)}" for note in found.notes]
    lines += [f"  problem: {one_line(problem)}" for problem in found.problems]
    if machine is not None:
        lines += ["", *_table(machine, table)]
    return lines


def _table(machine: "Machine", table: "list[Cost]") -> list[str]:
    from vox_serve.model_costs import FRAMES_PER_S

    how = "measured" if machine.is_measured else "assumed"
    heads = f"  {'flags':18}{'memory':>10}{'a frame reads':>16}{'frames/s':>10}"
    lines = [f"{heads}  on this machine's {machine.device.upper().replace('CUDA', 'GPU')}"]
    for cost in table:
        if not cost.fits:
            verdict = "does not fit its memory"
        elif cost.is_real_time:
            verdict = "faster than real time"
        else:
            verdict = f"{cost.frames_per_s / FRAMES_PER_S:.2f} of real time"
        lines.append(
            f"  {cost.flags:18}{_size(cost.memory_bytes):>10}{_size(cost.frame_bytes):>16}"
            f"{cost.frames_per_s:>10.1f}  {verdict}"
        )
    return [
        *lines,
        f"  frames/s: at most, for one request, at {machine.bytes_per_s / 1e9:.1f} GB/s ({how}); "
        f"{FRAMES_PER_S:g} are real time; memory: {_size(machine.memory_bytes)}",
    ]


def _shape(part: "TransformerConfig") -> str:
    return (
        f"{part.num_layers} layers, width {part.dim}, {part.num_heads} heads of {part.head_dim} "
        f"({part.num_kv_heads} for keys and values), feed-forward {part.ffn_dim}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(main())
