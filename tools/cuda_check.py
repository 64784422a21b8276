"""Compile every CUDA kernel for every target and print the resources each one uses.

    python tools/cuda_check.py [--arch 90a] [--jobs 2] [FILE.cu ...]

Needs nvcc, binutils and torch's headers, no GPU. Warnings are errors. Exits with 1 if a source does
not compile, or if a kernel spills registers or keeps an array in local memory: both would send
registers through memory. `text` is bytes of machine code: code that runs once comes from L2, and a
multiprocessor caches some 128 KB of it, 32 KB of them close by.
"""

import argparse
import concurrent.futures
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "89", "90a", "100a")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?P<rest>[^\n]*)",
    re.DOTALL,
)


SECTION = re.compile(r"\] \.text\.(?P<name>\w+) +PROGBITS +\w+ +\w+ +(?P<bytes>[0-9a-f]+)")


def text_bytes(cubin: Path) -> dict[str, int]:
    """Bytes of machine code of each kernel, by its mangled name."""
    sections = subprocess.run(
        ["readelf", "-SW", cubin], capture_output=True, text=True, check=True
    ).stdout
    return {m["name"]: int(m["bytes"], 16) for m in SECTION.finditer(sections)}


def compile_source(
    source: Path, architectures: list[str]
) -> tuple[subprocess.CompletedProcess, dict[str, dict[str, int]]]:
    """nvcc's result and, for each architecture, each kernel's bytes of machine code."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("nvcc", "-c", "-std=c++20", "-Xptxas", "-v", "-Werror", "all-warnings"),
            *("-Xcompiler", "-Wall,-Wextra,-Wno-missing-field-initializers"),
            *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),
            *("-I", str(ROOT / "csrc")),
            *("-isystem", str(Path(torch.__file__).parent / "include")),
            *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures),
            *("-keep", "--keep-dir", folder, "-o", f"{folder}/out.o", str(source)),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        text: dict[str, dict[str, int]] = {a: {} for a in architectures}
        for a in architectures:
            # With a single architecture, nvcc leaves it out of the file name.
            for cubin in Path(folder).glob(f"*_{a}.cubin" if len(architectures) > 1 else "*.cubin"):
                text[a].update(text_bytes(cubin))
        return result, text


def demangle(name: str) -> str:
    """`rms_norm_kernel<bf16, 8>`, without namespaces and parameters."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    full = re.sub(
        r"\(anonymous namespace\)::|\b[a-z_]+::|^void |\(int\)|\(bool\)",
        "",
        full,
    )
    return re.sub(r"\([^()]*\)$", "", full)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="such as 90a; all targets by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("sources", nargs="*", type=Path)
    args = parser.parse_args()
    sources = args.sources or sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    failed = False
    print(
        f"{'kernel':58} {'sm':>5} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6} "
        f"{'text':>7}"
    )
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda s: compile_source(s, args.arch or ARCHITECTURES), sources)
        for source, (result, text) in zip(sources, results, strict=True):
            if result.returncode:
                failed = True
                print(f"{source.name} does not compile:\n{result.stdout}{result.stderr}")
                continue
            for entry in ENTRY.finditer(result.stdout + result.stderr):
                spills = int(entry["stores"]) + int(entry["loads"])
                shared = re.search(r"(\d+) bytes smem", entry["rest"])
                bad = spills > 0 or int(entry["stack"]) > 0
                failed |= bad
                print(
                    f"{demangle(entry['name']):58} {entry['arch']:>5} {entry['registers']:>9} "
                    f"{shared[1] if shared else 0:>7} {entry['stack']:>6} {spills:>6} "
                    f"{text[entry['arch']][entry['name']]:>7}"
                    + (" <- through memory" if bad else "")
                )
    return int(failed)


if __name__ == "__main__":
    # voxkern.console needs the built package; without sockets, the default handler is enough.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
