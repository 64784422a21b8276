"""Every command of docs/walkthrough.md runs as it stands."""

import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import soundfile

from forked_python import python

PAGE = Path(__file__).parents[2] / "docs" / "walkthrough.md"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_every_command_runs(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    blocks = [(kind, text.replace("8000", port)) for kind, text in BLOCK.findall(PAGE.read_text())]
    assert [kind for kind, _ in blocks].count("sh") == 10
    (tmp_path / "bin").mkdir()
    commands = {
        "python": f'exec {shlex.join(python())} "$@"',
        # curl exits with 0 whatever the status
        "curl": 'PATH=${PATH#*:} exec curl --fail-with-body -sS "$@"',
    }
    for name, line in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    (_, launch), *rest = blocks
    command = ["bash", "-c", f"exec {launch}"]
    server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert any("is ready" in line for line in server.stdout)
        for kind, text in rest:
            command = ["bash", "-ec", text] if kind == "sh" else [*python(), "-c", text]
            done = subprocess.run(
                command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, (text, done.stdout, done.stderr)
    finally:
        server.terminate()
        server.wait(60)
        server.stdout.close()
    for wav in re.findall(r"-o (\w+\.wav)", PAGE.read_text()):
        seconds = 10 if wav.startswith("chapter") else 0.3
        if wav != "chapter.wav":  # its header has no length, since it was streamed
            assert soundfile.info(tmp_path / wav).duration > seconds, wav
        assert (tmp_path / wav).stat().st_size > 44 + 48_000 * seconds, wav
