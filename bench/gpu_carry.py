"""Gather what a machine with a GPU and without a network lacks into one small folder.

    python bench/gpu_carry.py FOLDER [--machine FILE] [--libraries FOLDER] [--no-tree]

`make gpu-carry` builds the libraries first and uses build/gpu-carry. The folder holds

    wheels/           for Python 3.12, what the project and its tests need and the machine lacks
    libraries.tar.xz  _C.so and _C_cuda.so, built for Hopper against torch 2.11:
                      bench/gpu_check.sh uses them if its own build fails
    tree.tar.gz       the committed files (left out with --no-tree, for a machine that has them)
    setup.sh          to be sourced there: installs the wheels into a folder of their own, and
                      sets PYTHONPATH and VOXKERN_PREBUILT

Exits with 1 if all of it, and the committed files where they are left out, exceed 60 MiB.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[1]
MAX_BYTES = 60 * 2**20
PYTHON_VERSION = "3.12"
# pip compares platform tags exactly: each glibc version that a package may name must be listed.
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)),
    "manylinux2014_x86_64",
]
SETUP = """\
# Source this file on the machine with the GPU: . setup.sh
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${SITE:-/tmp/voxkern-site}
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" \\
  "$here"/wheels/*.whl
mkdir -p "$site/prebuilt" && tar -xf "$here/libraries.tar.xz" -C "$site/prebuilt"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" VOXKERN_PREBUILT="$site/prebuilt"
"""


def read_machine(file: Path) -> dict[str, str]:
    """The packages that a machine has: canonical name to version, "" if it is not known."""
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    found = [line.partition("==") for line in lines if line]
    return {canonicalize_name(name.strip()): version.strip() for name, _, version in found}


def lacking(requirements: list[str], machine: dict[str, str]) -> list[str]:
    """The requirements that no package of the machine meets."""
    found = []
    for line in requirements:
        needed = Requirement(line)
        name = canonicalize_name(needed.name)
        if needed.marker and not needed.marker.evaluate({"python_version": PYTHON_VERSION}):
            continue
        version = machine.get(name)
        if version is None or (version and not needed.specifier.contains(version)):
            found.append(f"{needed.name}{needed.specifier}")
    return found


def project_requirements() -> list[str]:
    """The requirements of the package and of its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["test"]]


def download(requirements: list[str], machine: dict[str, str], folder: Path) -> None:
    """Download wheels of the requirements and of all that they need, but for what the machine has.

    Raises:
        CalledProcessError: pip found no wheels that fit each other.
    """
    names = {canonicalize_name(Requirement(line).name) for line in requirements}
    kept = {name: version for name, version in machine.items() if version and name not in names}
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    command += ["--python-version", PYTHON_VERSION, "--implementation", "cp"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    command += ["--dest", str(folder), "--constraint", str(constraints), *requirements]
    subprocess.run(command, check=True)
    constraints.unlink()
    for wheel in folder.glob("*.whl"):
        if (name := parse_wheel_filename(wheel.name)[0]) in machine and name not in names:
            wheel.unlink()


def pack_libraries(folder: Path, archive: Path) -> None:
    """Pack both libraries of a build, without their symbols."""
    with tarfile.open(archive, "w:xz") as packed:
        for name in ("_C.so", "_C_cuda.so"):
            stripped = archive.with_name(name)
            subprocess.run(["strip", "-o", stripped, folder / name], check=True)
            packed.add(stripped, name)
            stripped.unlink()


def tree_bytes() -> int:
    """The size of the committed files."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return sum(path.lstat().st_size for path in paths if path.exists())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to make; what it holds is deleted first")
    parser.add_argument(
        "--machine",
        type=Path,
        default=ROOT / "bench" / "gpu_machine.txt",
        help="what the machine has, as `pip list --format=freeze` prints it",
    )
    parser.add_argument("--libraries", type=Path, help="folder of _C.so and _C_cuda.so to pack")
    parser.add_argument(
        "--no-tree", action="store_true", help="the machine gets the committed files otherwise"
    )
    args = parser.parse_args()
    machine = read_machine(args.machine)
    shutil.rmtree(args.folder, ignore_errors=True)
    wheels = args.folder / "wheels"
    wheels.mkdir(parents=True)
    requirements = lacking(project_requirements(), machine)
    print(f"The machine lacks {', '.join(requirements)}", flush=True)
    download(requirements, machine, wheels)
    if args.libraries:
        pack_libraries(args.libraries, args.folder / "libraries.tar.xz")
    if not args.no_tree:
        archive = args.folder / "tree.tar.gz"
        subprocess.run(
            ["git", "archive", "--format=tar.gz", f"--output={archive.resolve()}", "HEAD"],
            cwd=ROOT,
            check=True,
        )
    (args.folder / "setup.sh").write_text(SETUP)
    sizes = {
        path.relative_to(args.folder): path.stat().st_size
        for path in sorted(args.folder.rglob("*"))
        if path.is_file()
    }
    if args.no_tree:
        sizes[Path("(the committed files)")] = tree_bytes()
    for path, size in sizes.items():
        print(f"{size / 2**20:8.2f} MiB  {path}")
    total = sum(sizes.values())
    print(f"{total / 2**20:8.2f} MiB  of at most {MAX_BYTES / 2**20:.0f}")
    return int(total > MAX_BYTES)


if __name__ == "__main__":
    sys.exit(main())
