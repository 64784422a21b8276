"""The HTTP server on a real socket."""

import http.client
import json
import socket
import threading
import time

from fake_engine import TIMEOUT_S, FakeEngine
from vox_serve.api import create_app
from vox_serve.config import Config
from vox_serve.launch import make_server, reserve_address
from vox_serve.runner import Runner


class LiveServer:
    """A server in its own thread, on a free port."""

    def __init__(self, engine: FakeEngine, **settings):
        config = Config(log_level="warning", **({"drain_s": 0.0} | settings))
        listener = reserve_address("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.runner = Runner.for_config(engine, config)
        self.app = create_app(self.runner, config, {})
        self.server = make_server(self.app, self.runner, config, listener)
        self.thread = threading.Thread(target=self.server.run, args=([listener],))

    def __enter__(self) -> "LiveServer":
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive()

    def post(self, **body) -> http.client.HTTPResponse:
        answer = http.client.HTTPResponse(self.post_raw(**body))
        answer.begin()
        return answer

    def post_raw(self, own: str = "127.0.0.1", **body) -> socket.socket:
        """A socket with the request sent and no response read. Its receive buffer is small.

        Args:
            own: the client's address.
            **body: fields of the request.
        """
        content = json.dumps(body).encode()
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        raw.settimeout(TIMEOUT_S)
        raw.bind((own, 0))
        raw.connect(("127.0.0.1", self.port))
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        raw.sendall(head.encode() + content)
        return raw


def wait_until(holds) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)
