"""The log: its two formats, request ids, and no text of any request."""

import json
import logging
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from live_client import PATH
from live_server import wait_until
from process_server import ProcessServer
from vox_serve.log_lines import JsonLines, TextLines, json_line
from vox_serve.logs import ShortPaths, server_log

TEXT = "Unspeakable-zebra"
SECRETS = [TEXT, "late poison", "an-unknown-field"]


def exchange(server: ProcessServer, name: str) -> None:
    """Requests that succeed, are refused, fail and break a step; then one whose id is `name`."""
    assert server.speak(TEXT, streaming=True).read()
    assert server.speak(TEXT).read()
    assert server.speak(TEXT, speaker=7).status == 422
    assert server.speak(TEXT, **{"an-unknown-field": TEXT}).status == 422
    assert server.speak("crash").status == 500
    server.speak("late poison", streaming=True).read1()
    assert server.request("POST", f"/v1/audio/voices?x={TEXT}", {"name": TEXT}).status >= 400
    assert server.request("GET", f"/generate?text={TEXT}").status == 405
    url = f"ws://127.0.0.1:{server.port}"
    with connect(f"{url}{PATH}?text={TEXT}"):
        pass
    with pytest.raises(InvalidStatus), connect(f"{url}/nowhere?text={TEXT}"):
        pass
    assert server.request("POST", "/generate", {"text": TEXT}, {"X-Request-Id": name}).read()


def lines_of(log: Path, name: str) -> list[str]:
    wait_until(lambda: f"{name}-" in log.read_text())
    return log.read_text().splitlines()


def test_a_text_log_names_requests_and_no_texts(tmp_path):
    log = tmp_path / "log"
    with ProcessServer(log) as server:
        exchange(server, "mine")
        lines = lines_of(log, "mine")
        server.process.terminate()
        said = server.process.stdout.read()
    assert any("request mine-" in line and "ended: stop, 3 frames" in line for line in lines)
    assert any(line.endswith("[mine]") and "POST /generate" in line for line in said.splitlines())
    for secret in SECRETS:
        assert secret not in "\n".join(lines)
        assert secret not in said


def test_a_json_log_is_an_object_a_line(tmp_path):
    log = tmp_path / "log"
    with ProcessServer(log, flags=["--log_format=json"]) as server:
        exchange(server, "mine")
        lines = lines_of(log, "mine")
        server.process.terminate()
        said = server.process.stdout.read().splitlines()
    entries = [json.loads(line) for line in (*lines, *said)]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    (ended,) = (e for e in entries if e.get("request_id") == "mine" and "ended" in e["message"])
    assert (ended["level"], ended["logger"]) == ("info", "vox_serve")
    (access,) = (e for e in entries if e.get("request_id") == "mine" and "status" in e)
    assert (access["method"], access["path"], access["status"]) == ("POST", "/generate", 200)
    failed = next(e for e in entries if e["message"].endswith("failed"))
    assert failed["request_id"] in failed["message"]
    assert "a bug in add" in failed["exception"]
    for secret in SECRETS:
        assert all(secret not in json.dumps(entry) for entry in entries)


def test_a_json_line():
    line = json_line("INFO", "a", 'say "ü"', 1_700_000_000.25, client="", path="/x", error=None)
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "a",
        "message": 'say "ü"',
        "path": "/x",
    }


def record(message: str, *args: object, name: str = "vox_serve") -> logging.LogRecord:
    return logging.LogRecord(name, logging.INFO, __file__, 1, message, args, None)


@pytest.mark.parametrize("path", ["/a", "/" + "x" * 300, "/a?text=secret"])
def test_paths_in_the_access_log_are_short(path):
    entry = record('%s "%s %s HTTP/%s" %d', "1.2.3.4", "GET", path, "1.1", 200)
    assert ShortPaths().filter(entry)
    assert len(entry.getMessage()) < 260
    assert "secret" not in entry.getMessage()


def test_formatters_are_put_back():
    handler = logging.StreamHandler()
    handler.setFormatter(before := logging.Formatter("%(message)s"))
    logger = logging.getLogger("uvicorn")
    logger.addHandler(handler)
    try:
        for log_format, kind in (("text", TextLines), ("json", JsonLines)):
            with server_log("info", log_format):
                assert isinstance(handler.formatter, kind)
            assert handler.formatter is before
    finally:
        logger.removeHandler(handler)
