"""Programs, modules and versions that bench/gpu_check.py requires, and those installed."""

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
    *(
        "transformers",
        "fastapi",
        "uvicorn",
        "python_multipart",
        "httpx",
        "soundfile",
        "soxr",
        "av",
        "websockets",
    ),
    *("huggingface_hub", "tqdm", "xdist"),
)


def add_usual_places() -> None:
    """Adds to PATH this interpreter's folder, where pip puts cmake and ninja, and CUDA's own."""
    interpreter_folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join(
        [interpreter_folder, *filter(None, [os.environ.get("PATH")]), "/usr/local/cuda/bin"]
    )


def missing() -> list[str]:
    """Required programs and modules that are not installed."""
    programs = [name for name in NEEDED_PROGRAMS if not shutil.which(name)]
    return programs + [name for name in NEEDED_MODULES if not importlib.util.find_spec(name)]


def absent() -> list[str]:
    """Optional modules that are not installed; tests that need them are skipped."""
    return [name for name in OPTIONAL_MODULES if not importlib.util.find_spec(name)]


def other_versions(pyproject: Path = PYPROJECT) -> list[str]:
    """Installed packages whose version pyproject.toml (with extra "test") does not allow."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with pytest
        return []
    project = tomllib.loads(pyproject.read_text())["project"]
    unsupported = []
    for line in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate():
            continue
        try:
            here = version(needed.name)
        except PackageNotFoundError:
            continue
        if not needed.specifier.contains(here, prereleases=True):
            unsupported.append(f"{needed.name} {here} for {needed.specifier}")
    return unsupported


def program_version(program: str) -> str:
    """The end of a program's `--version` output; empty if it is not installed."""
    try:
        printed = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join(printed.split())[-200:]
