"""Clusters that change while they are under load, with real Ray: `make cluster-test`."""

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("ray", reason="needs Ray: pip install 'voxkern[cluster]'")

from checkpoints import build_tiny
from cluster_process import START_TIMEOUT_S, ClusterProcess, flags

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny(seed=5).write(tmp_path_factory.mktemp("checkpoint"))


@contextmanager
def load(cluster: ClusterProcess, num_clients: int, **fields):
    """Clients that speak one text after another; yields their number of answers by status, -1 for
    those that were cut."""
    seen: dict[int, int] = {}
    ending = threading.Event()

    def client() -> None:
        while not ending.is_set():
            try:
                answer = cluster.speak("Hello.", timeout_s=120, **fields)
                answer.read()
                status = answer.status
            except Exception:
                status = -1
            seen[status] = seen.get(status, 0) + 1

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def underruns(cluster: ClusterProcess) -> float:
    lines = cluster.request("GET", "/metrics").read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("voxkern_underruns_"))


def test_replicas_come_and_go_with_the_load(model):
    auto = ("--replicas", "auto", "--max_replicas", "2", "--up_s", "1", "--down_s", "5")
    with ClusterProcess(
        *flags(model, auto), "--max_batch_size", "2", "--policy", "fifo"
    ) as cluster:
        assert len(cluster.health()["replicas"]) == 1
        with load(cluster, 4, streaming=True, max_frames=100) as seen:
            cluster.wait_until(lambda: len(cluster.health()["replicas"]) == 2)
            time.sleep(5)
        cluster.wait_until(lambda: len(cluster.health()["replicas"]) == 1)
        cluster.wait_until(lambda: len(cluster.replicas()) == 1)
        assert seen.keys() <= {200, 429}, seen
        assert cluster.stop() == 0


def test_new_settings_fail_no_request(model):
    common = [*flags(model), "--drain_s", "5"]
    with ClusterProcess(*common) as cluster:
        old = set(cluster.replicas())
        with load(cluster, 2, max_frames=20) as seen:
            subprocess.run(
                [sys.executable, "-m", "vox_serve.cluster", "--address", "auto", "--update",
                 *common, "--max_frames_limit", "50"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                     "RAY_TMPDIR": cluster.folder, "VOX_SERVE_TRACEBACK": "1"},
                check=True,
                timeout=START_TIMEOUT_S,
            )  # fmt: skip
            cluster.wait_until(lambda: not old & set(cluster.replicas()))
        assert seen.keys() == {200}, seen
        assert len(cluster.replicas()) == 2
        assert cluster.speak("Hello.", max_frames=60).status == 422
        assert cluster.stop() == 0
