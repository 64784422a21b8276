"""Load a build of the CUDA library and check that it registers a kernel for every op.

    python tools/cuda_link_check.py FOLDER

FOLDER holds _C.so and _C_cuda.so. Needs the CUDA torch that they were built against, no GPU
(`make cuda-link-check` builds both). Exits with 1 if an op has no CUDA kernel.
"""

import argparse
import sys
from pathlib import Path

import torch

DISPATCHER = torch._C


def tensor_ops() -> list[str]:
    """The names of voxkern's ops that take a tensor."""
    return sorted(
        schema.name
        for schema in DISPATCHER._jit_get_all_schemas()
        if schema.name.startswith("voxkern::")
        and any("Tensor" in str(argument.type) for argument in schema.arguments)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of _C.so and _C_cuda.so")
    folder = parser.parse_args().folder
    if torch.version.cuda is None:
        sys.exit(f"torch {torch.__version__} has no CUDA: install a CUDA build of torch")
    for name in ("_C.so", "_C_cuda.so"):
        torch.ops.load_library(folder / name)
    ops = tensor_ops()
    missing = [
        name for name in ops if not DISPATCHER._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    ]
    for name in missing:
        print(f"{name} has no CUDA kernel")
    print(f"torch {torch.__version__}: {len(ops) - len(missing)} of {len(ops)} ops have one")
    return int(bool(missing) or not ops)


if __name__ == "__main__":
    sys.exit(main())
