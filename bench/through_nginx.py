"""First bytes through an nginx with its defaults, beside those of the server itself.

    python bench/through_nginx.py [--runs N]

Starts a server with the built-in voice and an nginx before it (Debian's package nginx-light). The
same streamed request goes to either in turn, on a new connection each time. For each format, the
table has medians in milliseconds: from the request to the first byte of the body. The last line is
JSON.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "python"), str(ROOT / "tests" / "support")]

from nginx import nginx  # noqa: E402
from vox_serve.formats import FORMATS  # noqa: E402

TEXT = "Please take the second door on the left."


def first_bytes_ms(port: int, name: str) -> float:
    """Time from a request to the first byte of its answer's body."""
    fields = {"input": TEXT, "response_format": name, "seed": 5}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    begin_s = time.monotonic()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/audio/speech", json.dumps(fields), headers)
    answer = connection.getresponse()
    assert answer.read(1), answer.status
    first_s = time.monotonic() - begin_s
    answer.read()
    connection.close()
    return first_s * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "vox_serve.launch", "--port=0", "--log_level=warning"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        try:
            line = next(line for line in server.stdout or () if "ready at" in line)
            port = int(line.split("ready at ")[1].split()[0].rpartition(":")[2])
            with nginx(Path(folder), port) as proxy:
                medians = measure(port, proxy, given.runs)
        finally:
            server.terminate()
    load = os.getloadavg()[0]
    result = {"runs": given.runs, "load": load, "processors": os.cpu_count(), "ms": medians}
    print(json.dumps(result))


def measure(port: int, proxy: int, num_runs: int) -> dict[str, dict[str, float]]:
    """Medians of each format: direct, through nginx, and of the difference within a pair."""
    print("format   direct    nginx   difference")
    medians = {}
    for name in FORMATS:
        pairs = []
        for number in range(num_runs + 1):
            ports = (port, proxy) if number % 2 else (proxy, port)
            found = {to: first_bytes_ms(to, name) for to in ports}
            pairs.append((found[port], found[proxy]))
        pairs = pairs[1:]  # the first one warms up
        direct, through = (statistics.median(column) for column in zip(*pairs, strict=True))
        more = statistics.median(b - a for a, b in pairs)
        figures = {"direct": direct, "nginx": through, "difference": more}
        medians[name] = {kind: round(value, 1) for kind, value in figures.items()}
        print(f"{name:6} {direct:8.1f} {through:8.1f} {more:12.1f}", flush=True)
    return medians


if __name__ == "__main__":
    main()
