import errno
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from checkpoints import build_tiny
from forked_python import python
from live_server import wait_until
from vox_serve import launch
from vox_serve.cli import CommandError
from vox_serve.launch import reserve_address, reserve_addresses, url_of

TIMEOUT_S = 120


@pytest.fixture
def no_loading(monkeypatch):
    def fail(*_):
        raise AssertionError("loaded a model for a command that cannot succeed")

    monkeypatch.setattr(launch, "make_engine", fail)


def test_an_address_is_reserved_but_not_yet_answered():
    with reserve_address("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize(
    ("address", "url"),
    [(("0.0.0.0", 80), "http://127.0.0.1:80"), (("::", 80, 0, 0), "http://[::1]:80"),
     (("10.1.2.3", 8000), "http://10.1.2.3:8000")],
)  # fmt: skip
def test_the_url_is_reachable_from_this_machine(address, url):
    class Bound:
        def getsockname(self):
            return address

    assert url_of(Bound()) == url


def test_a_port_in_use_is_one_line_before_any_work(no_loading, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert launch.main(["--port", str(port)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == f"vox-serve: error: cannot listen on 127.0.0.1 port {port}: Address already in use"
    )


def test_a_host_that_is_not_ours_is_one_line(no_loading):
    with pytest.raises(CommandError, match=r"cannot listen on 192\.0\.2\.1 port 0"):
        reserve_address("192.0.2.1", 0)
    with pytest.raises(CommandError, match=r"--host no\.such\.host\.invalid"):
        reserve_address("no.such.host.invalid", 0)


def resolve_to(monkeypatch, *addresses):
    """Make every name resolve to these addresses."""
    lookup = socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        hosts = addresses if host == "localhost" else [host]
        return [found for name in hosts for found in lookup(name, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def bound(host: str, port: int = 0) -> list[str]:
    """Addresses on which a server of this host listens; all have one port."""
    listeners = reserve_addresses(host, port)
    names = [listener.getsockname()[:2] for listener in listeners]
    for listener in listeners:
        listener.close()
    assert len({port for _, port in names}) == 1
    return [address for address, _ in names]


def test_localhost_is_all_its_addresses(monkeypatch):
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1", "127.0.0.2")
    assert bound("localhost") == ["127.0.0.2", "127.0.0.1"]


@pytest.mark.parametrize("addresses", [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
@pytest.mark.parametrize("missing", ["socket", "address"])
def test_localhost_works_without_ipv6(addresses, missing, monkeypatch):
    class NoIPv6(socket.socket):
        def __init__(self, family=socket.AF_INET, *args, **kwargs):
            if missing == "socket" and family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *args, **kwargs)

        def bind(self, address):
            if ":" in address[0]:
                raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
            super().bind(address)

    resolve_to(monkeypatch, *addresses)
    monkeypatch.setattr(socket, "socket", NoIPv6)
    assert bound("localhost") == ["127.0.0.1"]
    resolve_to(monkeypatch, "::1")
    with pytest.raises(CommandError, match="cannot listen on ::1 port 0: "):
        reserve_addresses("localhost", 0)


def test_a_port_in_use_on_one_of_the_addresses_is_an_error(monkeypatch):
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CommandError, match=f"127.0.0.1 port {port}: Address already in use"):
            reserve_addresses("localhost", port)
        socket.create_server(("127.0.0.2", port)).close()  # the other address was let go


def test_no_host_is_one_socket_for_all_addresses():
    assert bound("") == ["0.0.0.0"]
    assert bound("0.0.0.0") == ["0.0.0.0"]
    with pytest.raises(CommandError, match="--host"):
        reserve_addresses("a..b", 0)


def test_an_unknown_model_is_one_line(capsys):
    assert launch.main(["--port", "0", "--model", "./nowhere"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vox-serve: error: ")
    assert "nowhere" in line


def test_help_needs_no_model_and_no_torch():
    code = "import sys; from vox_serve import launch, say, config\n"
    code += "assert not {'torch', 'fastapi', 'uvicorn', 'soundfile'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())
    done = subprocess.run(
        [sys.executable, "-m", "vox_serve.launch", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=_environment(),
    )
    assert "--max_batch_size SIZE" in done.stdout
    assert "--allow_pickle, --no-allow_pickle" in done.stdout
    assert "allow-pickle" not in done.stdout


@pytest.mark.slow
def test_serving_needs_no_transformers():
    code = "import sys, vox_serve.loading, vox_serve.api, vox_serve.runner, uvicorn\n"
    code += (
        "assert not {'transformers', 'scipy', 'soundfile', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([*python(), "-c", code], check=True, env=_environment())


def _environment() -> dict[str, str]:
    """This process's environment with its import path: the package may not be installed."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "VOX_SERVE_DEVICE": "cpu"}


@pytest.fixture(scope="module")
def documented_server(tmp_path_factory):
    """The documented command line on a tiny checkpoint: its process, and its port."""
    folder = build_tiny(stop_frame=3).write(tmp_path_factory.mktemp("checkpoint"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    line = f"-m vox_serve.launch --model {folder} --port {port} --temperature 0.7 --top_p 0.9 "
    line += "--repetition_penalty 1.1"
    log = Path(tmp_path_factory.mktemp("log")) / "stderr"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *line.split()],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(),
        )
    said = []
    for text in process.stdout:
        said.append(text)
        if "curl" in text:
            break
    assert process.poll() is None, log.read_text()
    yield process, port, "".join(said), log
    process.kill()
    process.wait(TIMEOUT_S)
    process.stdout.close()


def _post(port: int, body: dict) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        assert answer.headers["content-type"] == "audio/wav"
        return answer.read()


@pytest.mark.slow
def test_the_documented_line_serves(documented_server):
    _, port, said, log = documented_server
    assert f"http://127.0.0.1:{port}" in said
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=TIMEOUT_S) as answer:
        health = json.load(answer)
    assert health["status"] == "ok"
    assert (health["device"], health["max_batch_size"]) == ("cpu", 32)
    whole = _post(port, {"text": "Hello.", "seed": 1})
    streamed = _post(port, {"text": "Hello.", "seed": 1, "streaming": True})
    assert len(whole) == 44 + 3 * 3840
    assert streamed[44:] == whole[44:]
    wait_until(lambda: log.read_text().count("ended: stop, 3 frames") == 2)
    with pytest.raises(urllib.error.HTTPError) as refused:
        _post(port, {"text": "Hello.", "speaker": 9})
    assert refused.value.code == 422
    assert "speaker" in json.load(refused.value)["detail"][0]["loc"]


@pytest.mark.slow
def test_an_interrupt_ends_the_server(documented_server):
    process, _, _, log = documented_server
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 0
    assert "Traceback" not in log.read_text()
