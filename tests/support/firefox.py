"""A real Firefox, driven through WebDriver BiDi, which it speaks itself: no driver is needed."""

import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")

TIMEOUT_S = 60

PREFERENCES = """
user_pref("media.autoplay.default", 0);
user_pref("media.autoplay.blocking_policy", 0);
user_pref("browser.shell.checkDefaultBrowser", false);
user_pref("datareporting.policy.dataSubmissionEnabled", false);
user_pref("toolkit.telemetry.enabled", false);
user_pref("app.update.enabled", false);
user_pref("network.captive-portal-service.enabled", false);
user_pref("network.connectivity-service.enabled", false);
"""


class Firefox:
    """A session of Firefox with one tab.

    Args:
        folder: for its profile.
    """

    def __init__(self, folder: Path):
        (folder / "user.js").write_text(PREFERENCES)
        log = folder / "firefox.log"
        command = [FIREFOX, "--headless", "--profile", str(folder), "--remote-debugging-port=0"]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            address = self._address(log) + "/session"
            options = {"proxy": None, "max_size": 2**26, "open_timeout": TIMEOUT_S}
            self._stack = ExitStack()
            self.socket = self._stack.enter_context(connect(address, **options))
            self._number = 0
            self.send("session.new", capabilities={})
            self.tab = self.send("browsingContext.getTree")["contexts"][0]["context"]
        except BaseException:
            self.process.kill()
            raise

    def _address(self, log: Path) -> str:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in log.read_text().splitlines():
                if "WebDriver BiDi listening on" in line:
                    return line.rpartition(" ")[2]
            time.sleep(0.1)
        raise RuntimeError(f"Firefox does not start: {log.read_text()[-500:]}")

    def send(self, method: str, **params: object) -> Any:
        """One command; its result."""
        self._number += 1
        self.socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(4 * TIMEOUT_S))
            if message.get("id") == self._number:
                if message["type"] == "error":
                    raise RuntimeError(message["message"])
                return message["result"]

    def open(self, url: str) -> None:
        self.send("browsingContext.navigate", context=self.tab, url=url, wait="complete")

    def run(self, script: str, *args: object) -> Any:
        """The JSON value that an async function with this body returns in the page."""
        given = json.dumps(args)
        found = self.send(
            "script.evaluate",
            expression=f"(async (...args) => {{ {script} }})(...{given}).then(JSON.stringify)",
            target={"context": self.tab},
            awaitPromise=True,
        )
        if found["type"] == "exception":
            raise RuntimeError(found["exceptionDetails"]["text"])
        return json.loads(found["result"].get("value", "null"))

    def until(self, script: str, *args: object, holds=bool) -> Any:
        """Run a script until its value is true, or what `holds` wants; that value."""
        deadline = time.monotonic() + TIMEOUT_S
        while not holds(value := self.run(script, *args)):
            assert time.monotonic() < deadline, f"{script!r} gives {value!r}"
            time.sleep(0.05)
        return value

    def close(self) -> None:
        try:
            self.send("browser.close")
        finally:
            self._stack.close()
            self.process.terminate()
            self.process.wait(TIMEOUT_S)
