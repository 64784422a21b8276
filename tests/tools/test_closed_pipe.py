"""Commands whose reader closes the pipe early, as in `command | head`."""

import os
import subprocess
from pathlib import Path

import pytest

from forked_python import python
from voxkern.console import quiet_on_closed_pipe

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "voxkern"],
        ["-m", "vox_serve.config"],
        [str(ROOT / "tools" / "cuda_check.py"), "--help"],
    ],
    ids=lambda command: Path(command[-1] if command[0] == "-m" else command[0]).stem,
)
def test_a_closed_pipe_ends_a_command_silently(command):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(
            [*python(), *command], stdout=write_end, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write_end)
    assert result.stderr == ""
    assert result.returncode in (141, -13)  # 128 + SIGPIPE, or the signal itself


def test_another_broken_pipe_still_raises():
    with pytest.raises(BrokenPipeError, match="a socket"), quiet_on_closed_pipe():
        raise BrokenPipeError("a socket")
