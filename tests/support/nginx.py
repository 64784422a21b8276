"""A real nginx with its defaults before a server."""

import http.client
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fake_engine import TIMEOUT_S
from live_server import wait_until
from vox_serve.launch import reserve_address

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

CONFIG = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://127.0.0.1:{server}; }}
    location /tts/ {{ proxy_pass http://127.0.0.1:{server}; }}
    location /bare/ {{ proxy_pass http://127.0.0.1:{server}/; }}
    location /live/ {{
      proxy_pass http://127.0.0.1:{server}/;
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection upgrade;
    }}
  }}
}}
"""


@contextmanager
def nginx(folder: Path, server_port: int) -> Iterator[int]:
    """The port of an nginx before a server of this machine.

    Paths below `/bare/` and `/live/` reach the server without these, all others as they are.
    WebSockets pass below `/live/`.
    """
    listener = reserve_address("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, port=port, server=server_port))
    command = [NGINX, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port))
        yield port
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        connection.request("GET", "/health/live")
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
