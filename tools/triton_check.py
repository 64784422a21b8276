"""Compile every Triton kernel at CSM-1B's shapes and list the GPU resources that each one uses.

    python tools/triton_check.py [--target cuda:90] [--dtype bfloat16] [--verbose]

Needs Triton, but no GPU: a model without memory (torch's meta device) runs its steps, and every
kernel that would be launched is compiled instead, for NVIDIA's sm_80 and sm_90 and AMD's gfx942.
Exits with 1 if a kernel does not compile, needs more shared memory than a multiprocessor has, or
spills registers in bfloat16 or with packed weights. float32 may spill: it is there to compare
codes.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

os.environ["VOXKERN_BACKEND"] = "triton"
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from bench_codec import our_codecs, random_model
from csm_1b_shapes import CSM_1B

from vox_serve.csm_weights import CsmWeights
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache
from vox_serve.loading import codec_precision
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig
from vox_serve.sampling import SamplingParams, SamplingRows
from voxkern.console import quiet_on_closed_pipe

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
PRECISIONS = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
}
MULTIPROCESSOR_BYTES = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "hip:gfx942": 64 << 10}
"""Maximum shared memory per block."""
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def source_of(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """The source and options that Triton would compile for this launch, if storages are aligned."""
    named = dict(zip(kernel.arg_names, args, strict=False))
    named |= {n: v for n, v in kwargs.items() if n in kernel.arg_names}
    options = {n: v for n, v in kwargs.items() if n not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}

    def type_of(value: object, place: tuple[int, ...], special: bool, align: bool) -> str | tuple:
        """Type of an argument or a tuple's entry; records constants and alignment on the way."""
        if isinstance(value, tuple):
            return tuple(type_of(v, (*place, i), special, align) for i, v in enumerate(value))
        if value is None or (special and isinstance(value, int) and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, Tensor):
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned and special and align:
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, int):
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    for i, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            special = not parameter.do_not_specialize
            align = not parameter.do_not_specialize_on_alignment
            signature[parameter.name] = type_of(value, (i,), special, align)
    return ASTSource(kernel, signature, constants, attributes), options


@contextlib.contextmanager
def recording(record: Callable) -> Iterator[None]:
    """Call `record(kernel, args, kwargs)` instead of every launch."""
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: record(self, args, kwargs)
    try:
        yield
    finally:
        JITFunction.run = run


def empty_model(dtype: torch.dtype, quantize: str) -> CsmModel:
    """CSM-1B with two layers in each transformer: more layers launch the same kernels again."""
    config = CsmConfig.from_json(CSM_1B)
    backbone, depth = (replace(part, num_layers=2) for part in (config.backbone, config.depth))
    config = replace(config, backbone=backbone, depth=depth)
    return CsmModel(config, CsmWeights.empty(config, dtype, torch.device("meta"), quantize))


def prefill(model: CsmModel, counts: Sequence[int]) -> None:
    """Prefill prompts of `counts` tokens as one ragged batch."""
    cache = KvCache(model.config.backbone, len(counts), model.dtype, model.device)
    batch = CacheBatch.prefill(cache, [CacheSequence() for _ in counts], counts)
    frames = empty_frames(model, sum(counts))
    model.backbone_step(frames, frames.bool(), batch, cache)


def decode(model: CsmModel, rows: int) -> None:
    """Decode one frame of `rows` sequences."""
    cache = KvCache(model.config.backbone, rows, model.dtype, model.device)
    sequences = [CacheSequence() for _ in range(rows)]
    for sequence in sequences:
        cache.extend(sequence, 127)
    batch = CacheBatch.decode(cache, sequences)
    frames = empty_frames(model, rows)
    hidden = model.backbone_step(frames, frames.bool(), batch, cache)
    model.draw_frames(hidden, SamplingRows.of([SamplingParams()] * rows, [0] * rows, model.device))


def empty_frames(model: CsmModel, count: int) -> Tensor:
    columns = model.config.num_codebooks + 1
    return torch.zeros(count, columns, dtype=torch.int64, device=model.device)


def run_steps(dtype: torch.dtype, quantize: str) -> None:
    """Run prefills, frames and codec steps at sizes that cover every tile a server uses."""
    model = empty_model(dtype, quantize)
    for counts in ((512,), (30, 20, 10), (5,)):
        prefill(model, counts)
    for rows in (1, 2, 8, 64):
        decode(model, rows)
    precision = codec_precision("cuda", dtype, quantize)
    mimi = our_codecs(random_model(), [precision], "meta")[precision]
    for rows in (1, 8, 64):
        codes = empty_frames(model, rows)[:, None, :-1]
        mimi.decode_step(codes, mimi.init_state(rows))


def resources(compiled: object, target: str) -> tuple[int, int]:
    """Registers per thread, and bytes per thread that are spilled or kept in local memory."""
    if target.startswith("hip"):
        text = compiled.asm["amdgcn"]
        registers, spills = (
            sum(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return registers, spills
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])


@quiet_on_closed_pipe()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--dtype", action="append", choices=PRECISIONS)
    args = parser.parse_args()

    launches: dict[str, dict[str, tuple]] = {}
    for precision in args.dtype or PRECISIONS:

        def record(kernel: JITFunction, args: tuple, kwargs: dict, precision=precision) -> None:
            source, options = source_of(kernel, args, kwargs)
            key = f"{source.hash()} {sorted(options.items())}"
            launches.setdefault(key, (precision, source, options))

        with recording(record), torch.inference_mode():
            run_steps(*PRECISIONS[precision])
    failed = False
    print(f"{'kernel':24} {'precision':9} {'constants':44} ", end="")
    print(f"{'target':11} {'warps':>5} {'registers':>9} {'shared':>7} {'spills':>6}")
    for precision, source, options in launches.values():
        for target in args.target or TARGETS:
            constants = " ".join(
                f"{source.fn.arg_names[i]}={value}"
                for (i, *_), value in source.constants.items()
                if source.fn.params[i].is_constexpr
            )
            print(f"{source.name:24} {precision:9} {constants:44} {target:11} ", end="", flush=True)
            backend, arch = target.split(":")
            gpu = (
                GPUTarget(backend, int(arch), 32)
                if backend == "cuda"
                else GPUTarget(backend, arch, 64)
            )
            try:
                compiled = triton.compile(source, target=gpu, options=options)
                registers, spills = resources(compiled, target)
                shared = compiled.metadata.shared
            except Exception as error:
                failed = True
                print(f"does not compile: {error}")
                continue
            note = ""
            if spills and precision != "float32":
                note = " <- spills"
            if shared > MULTIPROCESSOR_BYTES[target]:
                note += " <- exceeds shared memory"
            failed |= bool(note)
            print(f"{options.get('num_warps', 4):5} {registers:9} {shared:7} {spills:6}{note}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
