"""Build the extension with CMake, which lists sources and compiler flags; the rest is in
pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILD = ROOT / "build" / "cmake"


class BuildWithCMake(build_ext):
    """Build voxkern/_C.so and, if CMakeLists.txt enables it, _C_cuda.so; an editable install puts
    them next to the sources."""

    def get_ext_filename(self, name: str) -> str:
        # No version of Python or torch in the name: the binary depends on neither.
        return name.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        # The cache stores the paths of cmake and torch; those of an isolated build no longer exist.
        shutil.rmtree(BUILD, ignore_errors=True)
        cuda = os.environ.get("VOXKERN_CUDA", "auto").lower()
        try:
            self.build_with_cmake(target, cuda)
        except subprocess.CalledProcessError:
            cache = BUILD / "CMakeCache.txt"
            tried = cache.exists() and "CMAKE_CUDA_COMPILER:" in cache.read_text()
            if cuda != "auto" or not tried:
                raise
            print(
                "voxkern: the build above failed; building again without the CUDA kernels "
                "(VOXKERN_CUDA=on makes this an error, VOXKERN_CUDA=off skips them)",
                file=sys.stderr,
            )
            self.build_with_cmake(target, "off")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # setuptools copies only _C.so. An old _C_cuda.so must not stay.
        built, beside = (Path(root, "voxkern", "_C_cuda.so") for root in (self.build_lib, ROOT))
        beside.unlink(missing_ok=True)
        if built.exists():
            shutil.copy(built, beside)

    def build_with_cmake(self, target: Path, cuda: str) -> None:
        target.with_name("_C_cuda.so").unlink(missing_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
            f"-DVOXKERN_TORCH={Path(torch.__file__).parent}",
            f"-DVOXKERN_CUDA={cuda}",
            *os.environ.get("VOXKERN_CMAKE_ARGS", "").split(),
        ]
        for command in (
            configure,
            [cmake, "--build", str(BUILD)],
            [cmake, "--install", str(BUILD), "--prefix", str(target.parent)],
        ):
            print("+", *command, file=sys.stderr)
            subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("voxkern._C", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
)
