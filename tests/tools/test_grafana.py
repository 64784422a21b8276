"""The board of examples/: a real Prometheus answers each of its queries with values of a server."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from fake_engine import TIMEOUT_S, FakeEngine
from live_server import LiveServer
from vox_serve.metrics import INFO, METRICS, PREFIX
from vox_serve.policy import Row

BOARD = json.loads((Path(__file__).parents[2] / "examples/grafana-dashboard.json").read_text())
TARGETS = [target for panel in BOARD["panels"] for target in panel["targets"]]
NAME = re.compile(rf"\b{PREFIX}\w+")
PROMETHEUS = shutil.which("prometheus")
CONFIG = """
global: {{scrape_interval: 500ms, scrape_timeout: 500ms}}
scrape_configs:
  - job_name: voxkern
    authorization: {{credentials: secret}}
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""

needs_prometheus = pytest.mark.skipif(
    not PROMETHEUS, reason="Prometheus is not installed (Debian's package: prometheus)"
)


def test_the_board_has_every_metric():
    known = {INFO}
    for metric in METRICS:
        known.add(PREFIX + metric.name)
        if metric.kind == "histogram":
            known |= {f"{PREFIX}{metric.name}_{part}" for part in ("bucket", "count", "sum")}
    shown = {name for target in TARGETS for name in NAME.findall(target["expr"])}
    assert shown <= known
    missing = [m.name for m in METRICS if not any(s.startswith(PREFIX + m.name) for s in shown)]
    assert not missing


def test_panels_do_not_overlap():
    taken = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


class Prometheus:
    """A Prometheus that scrapes a server on this machine."""

    def __init__(self, folder: Path, port: int) -> None:
        config = folder / "prometheus.yml"
        config.write_text(CONFIG.format(port=port))
        command = [PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
        self.process = subprocess.Popen(
            [*command, "--web.listen-address=127.0.0.1:0", "--log.format=json"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in self.process.stderr:
            entry = json.loads(line)
            if entry.get("msg") == "Listening on":
                self.url = f"http://{entry['address']}"
                return
        raise AssertionError("Prometheus did not start")

    def query(self, expression: str) -> list:
        form = urllib.parse.urlencode({"query": expression}).encode()
        with urllib.request.urlopen(f"{self.url}/api/v1/query", form, TIMEOUT_S) as answer:
            body = json.load(answer)
        assert body["status"] == "success"
        return body["data"]["result"]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        self.process.stderr.close()


@needs_prometheus
@pytest.mark.slow
def test_prometheus_answers_every_query(tmp_path):
    engine = FakeEngine(num_frames=3)
    engine.rows = [Row("a", 1.0, num_frames=1)]
    engine.times.observe(4, 0, 0.01)
    with LiveServer(engine, api_key="secret") as server:
        prometheus = Prometheus(tmp_path, server.port)
        try:
            deadline = time.monotonic() + TIMEOUT_S
            empty = {"all"}
            while empty and time.monotonic() < deadline:
                speak(server.port, streaming=True)
                speak(server.port, streaming=False)
                time.sleep(0.2)
                empty = {
                    target["expr"]
                    for target in TARGETS
                    if not prometheus.query(without_variables(target["expr"]))
                }
            assert not empty
            (audio,) = prometheus.query("voxkern_audio_seconds_total")
            assert float(audio["value"][1]) > 0
        finally:
            prometheus.stop()


def speak(port: int, streaming: bool) -> None:
    body = json.dumps({"text": "a", "streaming": streaming}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate", body, {"X-API-Key": "secret"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        answer.read()


def without_variables(expression: str) -> str:
    """A query as Grafana sends it when everything is selected."""
    expression = expression.replace("$__rate_interval", "10s")
    return expression.replace("$instance", ".*").replace("$job", ".*")


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_has_nothing_to_say():
    with LiveServer(FakeEngine()) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            text = answer.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
