"""The compiled extension itself: what its objects must not hold."""

import shutil
import subprocess
from pathlib import Path

import pytest

OBJECTS = sorted(
    path
    for path in Path(__file__).parents[1].glob("build/cmake/CMakeFiles/voxkern_*.dir/**/*.o")
    if "voxkern_cuda" not in str(path)
)


@pytest.mark.skipif(not OBJECTS or not shutil.which("nm"), reason="no build directory, or no nm")
def test_isa_passes_share_no_symbols_and_run_nothing_at_load():
    """The linker might keep an AVX-512 object's copy of a weak symbol for every processor."""
    for path in OBJECTS:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        weak = [line for line in symbols.stdout.splitlines() if line[17:18] in ("W", "V", "u")]
        assert not weak, f"{path.name}: {weak}"
        # Code that runs when the library is loaded, on every processor.
        assert "_GLOBAL__" not in symbols.stdout, path.name
