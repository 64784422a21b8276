"""The compiled extension: symbols that its objects must not have, and where it is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from forked_python import python

ROOT = Path(__file__).parents[2]
OBJECTS = sorted(
    path
    for path in ROOT.glob("build/cmake/CMakeFiles/voxkern_*.dir/**/*.o")
    if "voxkern_cuda" not in str(path)
)


@pytest.mark.slow
@pytest.mark.skipif(not OBJECTS or not shutil.which("nm"), reason="no build directory, or no nm")
def test_isa_passes_share_no_symbols_and_run_nothing_at_load():
    """The linker might keep the AVX-512 copy of a weak symbol for all processors."""
    for path in OBJECTS:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        weak = [line for line in symbols.stdout.splitlines() if line[17:18] in ("W", "V", "u")]
        assert not weak, f"{path.name}: {weak}"
        # Initialisers run on every processor when the library is loaded.
        assert "_GLOBAL__" not in symbols.stdout, path.name


CMAKE = """#!/bin/sh
echo "cmake $*"
case "$*" in
*VOXKERN_CUDA=$BREAKS*) touch "$FOLDER/broken"; mkdir -p build/cmake
  echo "CMAKE_CUDA_COMPILER:STRING=nvcc" > build/cmake/CMakeCache.txt ;;
*VOXKERN_CUDA=*) rm -f "$FOLDER/broken"; case "$*" in *=off*) touch "$FOLDER/no_cuda" ;; esac ;;
--build*) test ! -e "$FOLDER/broken" ;;
--install*) mkdir -p "$4"; echo new > "$4/_C.so"
  test -e "$FOLDER/no_cuda" || echo new > "$4/_C_cuda.so" ;;
esac
"""


def build(folder: Path, cuda: str, breaks: str = "nothing") -> subprocess.CompletedProcess:
    """An editable install's build, with a fake cmake that fails for one value of VOXKERN_CUDA."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    for package in ("voxkern/reference", "python/vox_serve/mimi"):
        (folder / package).mkdir(parents=True)
    (folder / "voxkern" / "_C_cuda.so").write_text("old")
    cmake = folder / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text(CMAKE)
    cmake.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{cmake.parent}{os.pathsep}{os.environ['PATH']}",
        "FOLDER": str(folder),
        "BREAKS": breaks,
        "VOXKERN_CUDA": cuda,
    }
    return subprocess.run(
        [*python(), "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("cuda", "content"), [("on", "new\n"), ("off", None)])
def test_both_libraries_lie_beside_the_sources(tmp_path, cuda, content):
    done = build(tmp_path, cuda)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "voxkern" / "_C.so").read_text() == "new\n"
    library = tmp_path / "voxkern" / "_C_cuda.so"
    assert (library.read_text() if library.exists() else None) == content


@pytest.mark.slow
def test_a_cuda_build_that_fails_leaves_the_cpu_kernels(tmp_path):
    done = build(tmp_path, "auto", breaks="auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "building again without the CUDA kernels" in done.stderr
    assert (tmp_path / "voxkern" / "_C.so").exists()
    assert not (tmp_path / "voxkern" / "_C_cuda.so").exists()


@pytest.mark.slow
def test_a_cuda_build_that_was_asked_for_must_not_fail(tmp_path):
    assert build(tmp_path, "on", breaks="on").returncode != 0
