"""Packages of Node that tests and tools use: package.json beside this lists them.

`make .venv/test` installs them into build/node where npm is, and so does `install`.
"""

import shutil
import subprocess
from pathlib import Path

LIST = Path(__file__).with_name("package.json")
FOLDER = LIST.parents[2] / "build" / "node"
MODULES = FOLDER / "node_modules"


def why_missing(package: str) -> str | None:
    """Why a package cannot be used here; None if it can."""
    if not shutil.which("node"):
        return "needs node"
    if not (MODULES / package).is_dir():
        return f"needs Node's package {package}: python tests/support/node_packages.py"
    return None


def install() -> None:
    """Install all of them.

    Raises:
        OSError, subprocess.CalledProcessError: npm is missing or fails.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.copy(LIST, FOLDER)
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(FOLDER)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    install()
