"""The command `python -m vox_serve.cluster` in a process of its own, with real Ray."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 120
START_TIMEOUT_S = 900
STOP_TIMEOUT_S = 120


class ClusterProcess:
    """A cluster on a free port, with files of its own. All its processes end with it.

    Args:
        flags: of the command.
        command: arguments of Python that run it.
    """

    def __init__(self, *flags: str, command: Sequence[str] = ("-m", "vox_serve.cluster")):
        self.folder = tempfile.mkdtemp(prefix="vk-")  # short: Ray's sockets lie below it
        self.log = Path(self.folder, "log")
        for _ in range(3):
            self._start([*command, "--port", "0", *flags])
            url = next((line for line in self.process.stdout if "ready at" in line), "")
            # Ray gives a node 30 s to start, which a busy machine may exceed.
            if url or "timed out during startup" not in self.log.read_text():
                break
            self._end()
        self._timer.cancel()
        if not url:
            log = self.log.read_text()
            self.__exit__()
            raise AssertionError(log)
        self.port = int(re.search(r":(\d+)\b", url.partition("http://")[2])[1])
        self._reader = threading.Thread(target=self.process.stdout.read, daemon=True)
        self._reader.start()

    def _start(self, args: Sequence[str]) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": self.folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
            "VOX_SERVE_TRACEBACK": "1",
        }
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *args],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self._timer = threading.Timer(START_TIMEOUT_S, self.kill)
        self._timer.start()

    def _end(self) -> None:
        self._timer.cancel()
        self.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> "ClusterProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """End every process of the cluster."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> int:
        """End the cluster as its user does; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)

    def pids(self) -> list[int]:
        """The processes of the cluster, known by their folder."""
        return [pid for pid, _ in self._processes()]

    def replicas(self) -> list[int]:
        """The processes of the replicas that have started."""
        return [pid for pid, title in self._processes() if b"ServeReplica:voxkern:Replica" in title]

    def _processes(self) -> list[tuple[int, bytes]]:
        found, own = [], self.folder.encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    title = (entry / "cmdline").read_bytes()
                    if b"RAY_TMPDIR=" + own in (entry / "environ").read_bytes():
                        found.append((int(entry.name), title))
        return found

    def request(
        self, method: str, path: str, body: object = None, timeout_s: float = TIMEOUT_S
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, json.dumps(body) if body is not None else None, kind)
        return connection.getresponse()

    def speak(self, text: str, timeout_s: float = TIMEOUT_S, **fields) -> http.client.HTTPResponse:
        return self.request("POST", "/generate", {"text": text, **fields}, timeout_s)

    def health(self) -> dict:
        return json.loads(self.request("GET", "/health").read())

    def codes(self, key: str) -> list[list]:
        """The codes of each turn of a conversation."""
        answer = self.request("GET", f"/v1/conversations/{key}?codes=1")
        return [turn["codes"] for turn in json.loads(answer.read())["turns"]]

    def wait_until(self, holds, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)


def flags(model: Path, replicas: Sequence[str] = ("--replicas", "2")) -> list[str]:
    """Replicas of a tiny model, of one thread each. How fast the machine is changes nothing."""
    fixed = ["--policy", "fifo", "--max_batch_size", "16", "--warm_up_s", "0.1"]
    return [*replicas, "--model", str(model), "--num_threads", "1", *fixed]
