"""Triton compiles every kernel for GPUs, and recompiles only when it must. Needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "triton_check.py"

ALIKE = """
import torch
from triton_check import PRECISIONS, decode, empty_model, prefill, recording, source_of

def kernels(step, model, size):
    found = set()
    def record(kernel, args, kwargs):
        source, options = source_of(kernel, args, kwargs)
        special = source.signature, source.constants, source.attrs, options
        found.add((kernel.fn.__name__, *(str(sorted(d.items(), key=str)) for d in special)))
    with recording(record), torch.inference_mode():
        step(model, size)
    return found

for precision in ("bfloat16", "int8"):
    model = empty_model(*PRECISIONS[precision])
    for step, sizes in (
        (prefill, ((1,), (15,), (16,), (5, 6), (2, 1, 3))),
        (prefill, ((17,), (32,), (16, 20), (20, 20, 20))),
        (prefill, ((65,), (256,), (512,), (256, 16), (100, 30, 7))),
        (decode, (3, 8, 15, 16)),
        (decode, (17, 32, 33, 64)),
    ):
        first = kernels(step, model, sizes[0])
        assert len(first) > 5
        for size in sizes[1:]:
            print(precision, step.__name__, sizes[0], size, kernels(step, model, size) ^ first)
"""


def test_every_kernel_of_a_bfloat16_frame_compiles_for_hopper_and_spills_nothing():
    """Triton keeps what it has compiled: the next run compiles only what has changed."""
    result = subprocess.run(
        [sys.executable, str(TOOL), "--target", "cuda:90", "--dtype", "bfloat16"],
        env={**os.environ, "TRITON_CACHE_DIR": str(ROOT / "build" / "triton")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for kernel in ("dense_gemm_kernel", "sample_tokens_kernel", "codec_gemm_kernel"):
        assert f"\n{kernel} " in result.stdout


def test_other_numbers_of_rows_or_pages_recompile_no_kernel():
    """Only another choice of tiles does: a running server would stall while Triton compiles."""
    path = [ROOT / "tools", ROOT, ROOT / "python", *os.environ.get("PYTHONPATH", "").split(":")]
    environment = {**os.environ, "PYTHONPATH": ":".join(str(folder) for folder in path)}
    result = subprocess.run(
        [sys.executable, "-c", ALIKE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 2 * 17
    assert [line for line in lines if not line.endswith(" set()")] == []
