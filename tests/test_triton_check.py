"""That Triton compiles its kernels for a GPU, which the interpreter cannot tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TOOL = Path(__file__).parents[1] / "tools" / "triton_check.py"


def test_every_kernel_of_a_bfloat16_frame_compiles_for_hopper_and_spills_nothing(tmp_path):
    result = subprocess.run(
        [sys.executable, str(TOOL), "--target", "cuda:90", "--dtype", "bfloat16"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for kernel in ("linear_kernel", "sample_tokens_kernel", "mimi_product_kernel"):
        assert f"\n{kernel} " in result.stdout
