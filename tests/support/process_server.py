"""The server's command in a process of its own, with a fake engine."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from fake_engine import TIMEOUT_S
from forked_python import python

CODE = """
import os, sys
from fake_engine import ENDLESS, FakeEngine
from vox_serve import launch

print(os.getpid(), flush=True)
engine = FakeEngine({engine})
{after}
launch.make_engine = lambda *_, **__: engine
launch.describe = lambda engine, config: {{}}
sys.exit(launch.main(sys.argv[1:]))
"""


class ProcessServer:
    """`vox-serve` on a free port, or on `port`.

    Args:
        log: where its stderr goes.
        engine: arguments of `FakeEngine`, as source.
        after: source that runs once `engine` exists.
        flags: of the command.
    """

    def __init__(self, log: Path, engine: str = "", after: str = "", port: int = 0, flags=()):
        self.log = log
        code = CODE.format(engine=engine, after=after)
        command = [*python(), "-c", code, "--port", str(port), "--log_level=info", *flags]
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.pid = int(self.process.stdout.readline() or 0)
        assert self.pid, log.read_text()
        url = next((line for line in self.process.stdout if "ready at" in line), "")
        assert url, log.read_text()
        self.port = int(re.search(r":(\d+)\b", url.partition("http://")[2])[1])

    def __enter__(self) -> "ProcessServer":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.signal(signal.SIGKILL)
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        headers = kind | (headers or {})
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        return connection.getresponse()

    def speak(self, text: str, **fields) -> http.client.HTTPResponse:
        return self.request("POST", "/generate", {"text": text, **fields})

    def status(self, path: str) -> int:
        response = self.request("GET", path)
        response.read()
        return response.status
