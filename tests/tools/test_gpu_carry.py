"""bench/gpu_carry.py, without a download."""

import subprocess
import sys
import tarfile
from pathlib import Path

import gpu_carry
import pytest

MACHINE = "# a comment\nnumpy==2.5.2\nHugging_Face-Hub==1.0   # with a comment\npytest\n"


def test_reads_what_a_machine_has(tmp_path):
    (tmp_path / "list").write_text(MACHINE)
    assert gpu_carry.read_machine(tmp_path / "list") == {
        "numpy": "2.5.2",
        "hugging-face-hub": "1.0",
        "pytest": "",
    }


def test_requirements_that_the_machine_lacks():
    machine = {"numpy": "2.5.2", "transformers": "5.17.0", "pytest": "", "hugging-face-hub": "1.0"}
    requirements = [
        "numpy",
        "transformers>=5.22,<6",
        "pytest",
        "hugging_face_hub",
        "soxr",
        "old; python_version < '3.12'",
    ]
    assert gpu_carry.lacking(requirements, machine) == ["transformers<6,>=5.22", "soxr"]


def test_the_committed_list_has_every_requirement_of_the_build():
    machine = gpu_carry.read_machine(gpu_carry.ROOT / "bench" / "gpu_machine.txt")
    assert not gpu_carry.lacking(["torch>=2.11,<2.14", "cmake", "ninja", "triton"], machine)


@pytest.fixture
def carry(tmp_path, monkeypatch):
    """Runs the command with a download that writes one wheel; returns its exit code."""

    def download(requirements, machine, folder: Path) -> None:
        assert requirements
        (folder / "soxr-1.0-py3-none-any.whl").write_bytes(bytes(2**20))

    monkeypatch.setattr(gpu_carry, "download", download)

    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_carry.py", str(tmp_path / "carry"), *options])
        return gpu_carry.main()

    return run


def test_packs_libraries_and_counts_the_size(carry, tmp_path, monkeypatch, capsys):
    for name in ("_C.so", "_C_cuda.so"):
        command = ["cc", "-shared", "-x", "c", "/dev/null", "-o", tmp_path / name]
        subprocess.run(command, check=True)
    monkeypatch.setattr(gpu_carry, "tree_bytes", lambda: 2**21)
    assert carry("--no-tree", "--libraries", str(tmp_path)) == 0
    folder = tmp_path / "carry"
    with tarfile.open(folder / "libraries.tar.xz") as packed:
        assert packed.getnames() == ["_C.so", "_C_cuda.so"]
    assert not (folder / "tree.tar.gz").exists()
    assert "3.0" in capsys.readouterr().out.splitlines()[-1]
    subprocess.run(["bash", "-n", folder / "setup.sh"], check=True)
    monkeypatch.setattr(gpu_carry, "MAX_BYTES", 2**20)
    assert carry("--no-tree") == 1
