"""Drives CMake, which knows the sources and the compiler flags; all else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class BuildWithCMake(build_ext):
    """Builds voxkern/_C.so, and _C_cuda.so where CMakeLists.txt says; in an editable install,
    beside the sources."""

    def get_ext_filename(self, name: str) -> str:
        # Neither Python's nor torch's version is in the name: the binary depends on neither.
        return name.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        build_dir = ROOT / "build" / "cmake"
        # It remembers the cmake and torch that made it; those of an isolated build are gone.
        shutil.rmtree(build_dir, ignore_errors=True)
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DVOXKERN_TORCH={Path(torch.__file__).parent}",
            f"-DVOXKERN_CUDA={os.environ.get('VOXKERN_CUDA', 'auto')}",
            *os.environ.get("VOXKERN_CMAKE_ARGS", "").split(),
        ]
        for command in (
            configure,
            [cmake, "--build", str(build_dir)],
            [cmake, "--install", str(build_dir), "--prefix", str(target.parent)],
        ):
            print("+", *command, file=sys.stderr)
            subprocess.run(command, check=True)


setup(
    ext_modules=[Extension("voxkern._C", sources=[])],
    cmdclass={"build_ext": BuildWithCMake},
)
