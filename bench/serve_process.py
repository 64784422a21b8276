"""Servers under load: processes started here, or one that runs already."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speech_client import Target

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 90
READY = re.compile(r"is ready at (http://\S+)")


@dataclass
class Server:
    """A server that is ready.

    Attributes:
        name: shown in tables.
        target: its route for speech.
        flags: of its command; None if it was not started here.
        process: None likewise.
    """

    name: str
    target: Target
    flags: list[str] | None = None
    process: subprocess.Popen | None = None

    def cpu_s(self) -> float | None:
        """Processor time that it has taken so far; None if it runs elsewhere."""
        stat = Path(f"/proc/{self.process.pid}/stat") if self.process else None
        if stat is None or not stat.exists():
            return None
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def describe(self) -> dict:
        """Its flags and its answer to /health, if it has one."""
        url = f"http://{self.target.host}:{self.target.port}/health"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                health = json.load(answer)
        except (OSError, ValueError):
            health = None
        return {"route": self.target.path, "flags": self.flags, "health": health}


@contextlib.contextmanager
def started(name: str, tree: Path, flags: list[str], log: Path, **target) -> Iterator[Server]:
    """A server of a checkout on a free port, stopped at the end.

    Args:
        name: of the server.
        tree: a checkout whose extension is built.
        flags: of `vox_serve.launch`.
        log: receives its output.
        target: further arguments of `Target`, and the `path` of its route.

    Raises:
        RuntimeError: it did not become ready; the message has the end of its log.
    """
    command = [sys.executable, "-m", "vox_serve.launch", "--port", "0", *flags]
    paths = [str(tree), str(tree / "python")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = _ready_url(process, log) + target.pop("path", "")
        yield Server(name, Target(url, **target), flags, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready_url(process: subprocess.Popen, log: Path) -> str:
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s and process.poll() is None:
        if found := READY.search(log.read_text(errors="replace")):
            return found[1].rstrip("/")
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-500:]}")
