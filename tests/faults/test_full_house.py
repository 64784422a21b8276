"""More clients than open files, and a log that stays small."""

import http.client
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading

import pytest

from fake_engine import TIMEOUT_S, expected_pcm
from forked_python import python
from live_server import wait_until
from vox_serve import connections
from vox_serve.audio import wav_file
from vox_serve.connections import connection_limit
from vox_serve.logs import RepeatFilter, ShortPaths

WHOLE = wav_file(expected_pcm("hello", 3))


@pytest.mark.parametrize(
    ("files", "wanted", "limit"),
    [
        (1024, None, 1024 - 30 - connections.SPARE_FILES),
        (1024, 100, 100),
        (1024, 5000, 1024 - 30 - connections.SPARE_FILES),
        (128, None, 128 - 30 - 32),
        (16, None, 1),
        (10**6, None, connections.DEFAULT_MAX_CONNECTIONS),
        (10**6, 50_000, 50_000),
        (resource.RLIM_INFINITY, None, connections.DEFAULT_MAX_CONNECTIONS),
    ],
)
def test_the_limit_stays_below_that_of_open_files(files, wanted, limit, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    monkeypatch.setattr(connections, "_count_open_files", lambda: 30)
    assert connection_limit(wanted) == limit


SERVER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from fake_engine import FakeEngine
from vox_serve import launch
launch.make_engine = lambda *_: FakeEngine()
launch.describe = lambda engine, config: {}
sys.exit(launch.main(["--port", sys.argv[1]]))
"""


@pytest.mark.slow
def test_more_silent_clients_than_descriptors_leave_normal_ones_unhurt(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*python(), "-c", SERVER, str(port)], stdout=output, stderr=output, env=environment
        )
    silent = []
    try:
        wait_until(lambda: "ready" in log.read_text())
        for i in range(400):
            silent.append(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S))
            if i % 50 == 49:
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
                client.request("POST", "/generate", json.dumps({"text": "hello"}))
                assert client.getresponse().read() == WHOLE
                client.close()
    finally:
        for raw in silent:
            raw.close()
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT_S)
    text = log.read_text()
    assert "Traceback" not in text
    assert "more like this" in text
    assert len(text) < 5000


def test_the_log_counts_what_repeats():
    lines = []
    logger = logging.Logger("vox_serve")
    repeats = RepeatFilter(period_s=600, num_first=2)
    logger.addFilter(repeats)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("vox_serve").addHandler(handler)
    logger.addHandler(handler)
    try:
        for i in range(1000):
            logger.warning("client %d is slow", i)
            logger.info("access %d", i)
        logger.error("another")
        assert [line for line in lines if "access" not in line] == [
            "client 0 is slow", "client 1 is slow", "another",
        ]  # fmt: skip
        assert len(lines) == 1003
        repeats.report()
        assert lines[-1] == "998 more like this in 600 s: client 999 is slow"
        logger.warning("client %d is slow", 5)
        assert lines[-1] == "client 5 is slow"
    finally:
        logging.getLogger("vox_serve").removeHandler(handler)


def test_the_count_is_logged_without_another_message():
    reported = threading.Event()
    repeats = RepeatFilter(period_s=0.05, num_first=1)
    handler = logging.Handler()
    handler.emit = lambda record: "more like" in record.getMessage() and reported.set()
    logger = logging.getLogger("vox_serve")
    logger.addHandler(handler)
    logger.addFilter(repeats)
    try:
        logger.warning("once")
        logger.warning("once")
        assert reported.wait(TIMEOUT_S)
    finally:
        logger.removeFilter(repeats)
        logger.removeHandler(handler)


def test_kinds_of_messages_are_bounded():
    repeats = RepeatFilter()
    for i in range(3000):
        repeats.filter(logging.LogRecord("x", logging.ERROR, "", 0, f"message {i}", (), None))
    assert len(repeats._kinds) <= 1000


def test_the_access_log_shows_short_paths():
    args = ("127.0.0.1:5", "GET", "/" + "x" * 10_000, "1.1", 404)
    record = logging.LogRecord(
        "uvicorn.access", logging.INFO, "", 0, '%s "%s %s %s" %d', args, None
    )
    assert ShortPaths().filter(record)
    assert len(record.getMessage()) < 300
    assert record.getMessage().endswith('1.1" 404')
