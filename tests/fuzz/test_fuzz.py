"""The fuzz targets on their corpus, and for a few seconds with atheris (docs/testing.md)."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import targets

HERE = Path(__file__).parent
SECONDS = int(os.environ.get("FUZZ_SECONDS", "3"))  # of each target
CORPUS = sorted(path for path in (HERE / "corpus").rglob("*") if path.is_file())


@pytest.fixture(scope="module", autouse=True)
def _set_up():
    targets.set_up()


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_corpus(path):
    targets.run(path.parent.name, path.read_bytes())


@pytest.mark.parametrize("name", targets.TARGETS)
def test_cut_and_flipped_seeds(name):
    """Without atheris: every seed cut short at some places, and with some bytes changed."""
    end = time.monotonic() + 2
    for path in CORPUS:
        data = path.read_bytes()
        if path.parent.name != name or not data:
            continue
        step = max(1, len(data) // 16)
        for at in range(0, len(data), step):
            if time.monotonic() > end:
                return
            targets.run(name, data[:at])
            targets.run(name, data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
            targets.run(name, data[:at] + b"\xff" * 8 + data[at + 8 :])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (extra: fuzz)"
)
def test_atheris():
    """One process imports torch for all targets, and forks before it starts any thread."""
    result = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), ",".join(targets.TARGETS), str(SECONDS)],
        capture_output=True,
        text=True,
        timeout=600 + 10 * SECONDS,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )
    assert result.returncode == 0, result.stderr[-4000:]


def test_the_corpus_is_small():
    assert sum(path.stat().st_size for path in CORPUS) < 200_000
