"""What bench/gpu_check.py needs of a machine: programs, modules, and which versions are here."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
NEEDED_PROGRAMS = ("cmake", "ninja", "nvcc", "c++")
NEEDED_MODULES = ("torch", "numpy", "pytest", "safetensors", "tokenizers")
OPTIONAL_MODULES = (
    *("transformers", "fastapi", "uvicorn", "python_multipart", "httpx", "soundfile", "soxr"),
    *("huggingface_hub", "tqdm", "xdist"),
)


def add_usual_places() -> None:
    """To PATH: beside this interpreter, where pip puts cmake and ninja, and CUDA's own folder."""
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join(
        [beside, *filter(None, [os.environ.get("PATH")]), "/usr/local/cuda/bin"]
    )


def missing() -> list[str]:
    """Programs and modules without which nothing can be done here."""
    programs = [name for name in NEEDED_PROGRAMS if not shutil.which(name)]
    return programs + [name for name in NEEDED_MODULES if not importlib.util.find_spec(name)]


def absent() -> list[str]:
    """Modules without which some tests are skipped."""
    return [name for name in OPTIONAL_MODULES if not importlib.util.find_spec(name)]


def other_versions(pyproject: Path = PYPROJECT) -> list[str]:
    """What is here in a version that pyproject.toml, extra "test" included, does not allow."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # which comes with pytest
        return []
    project = tomllib.loads(pyproject.read_text())["project"]
    others = []
    for line in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate():
            continue
        try:
            here = version(needed.name)
        except PackageNotFoundError:
            continue
        if not needed.specifier.contains(here, prereleases=True):
            others.append(f"{needed.name} {here} for {needed.specifier}")
    return others


def version_of(program: str) -> str:
    """What a program says of itself; empty if it is not there."""
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join(said.split())[-200:]
