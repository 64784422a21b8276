"""A real Chromium, driven through ChromeDriver: the part of WebDriver's protocol that tests use."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")

TIMEOUT_S = 60
"""Limit for a wait that a correct page ends in seconds, even on a busy machine."""

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--window-size=1000,1100",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def why_missing() -> str | None:
    """Why no browser can be driven here; None if one can."""
    missing = [
        name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if not path
    ]
    return f"needs {' and '.join(missing)} (Debian: chromium, chromium-driver)" if missing else None


class BrowserError(RuntimeError):
    """The browser refused a command, or a script in the page failed."""


class Browser:
    """A session of Chromium.

    Args:
        folder: for its profile and downloads.
        flags: further flags of Chromium.
    """

    def __init__(self, folder: Path, flags: Sequence[str] = ()):
        self.folder = folder
        self.driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        line = next(line for line in self.driver.stdout if "successfully on port" in line)
        self.root = f"http://127.0.0.1:{int(line.rstrip().rstrip('.').rpartition(' ')[2])}/session"
        self.session = ""
        options = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--user-data-dir={folder}", *flags],
            "prefs": {"download.default_directory": str(folder)},
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            made = self.send("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.driver.kill()
            raise
        self.session = f"/{made['sessionId']}"
        self.send("POST", "/timeouts", {"script": TIMEOUT_S * 1000})

    def close(self) -> None:
        try:
            self.send("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(TIMEOUT_S)
            self.driver.stdout.close()

    def send(self, method: str, path: str, body: object = None) -> Any:
        """One command; its value."""
        data = json.dumps(body or {}).encode() if method == "POST" else None
        url = self.root + self.session + path
        wanted = urllib.request.Request(
            url, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(wanted, timeout=2 * TIMEOUT_S) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise BrowserError(json.load(error)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self.send("POST", "/url", {"url": url})

    def run(self, script: str, *args: object) -> Any:
        """The value that an async function with this body returns in the page."""
        wrapped = (
            "const done = arguments[arguments.length - 1];"
            f"(async (...args) => {{ {script} }})(...arguments)"
            ".then((value) => done({ value }), (error) => done({ error: String(error) }));"
        )
        found = self.send("POST", "/execute/async", {"script": wrapped, "args": list(args)})
        if "error" in found:
            raise BrowserError(found["error"])
        return found.get("value")

    def until(self, script: str, *args: object, holds: Callable[[Any], bool] = bool) -> Any:
        """Run a script until its value is true, or what `holds` wants; that value."""
        deadline = time.monotonic() + TIMEOUT_S
        while not holds(value := self.run(script, *args)):
            assert time.monotonic() < deadline, f"{script!r} gives {value!r}"
            time.sleep(0.05)
        return value

    def _element(self, selector: str) -> str:
        found = self.send("POST", "/element", {"using": "css selector", "value": selector})
        return f"/element/{found[ELEMENT]}"

    def click(self, selector: str) -> None:
        self.send("POST", f"{self._element(selector)}/click")

    def type(self, selector: str, text: str, clear: bool = True) -> None:
        element = self._element(selector)
        if clear:
            self.send("POST", f"{element}/clear")
        self.send("POST", f"{element}/value", {"text": text})

    def text(self, selector: str) -> str:
        return self.send("GET", f"{self._element(selector)}/text")

    def new_tab(self) -> str:
        handle = self.send("POST", "/window/new", {"type": "tab"})["handle"]
        self.switch_to(handle)
        return handle

    def tab(self) -> str:
        return self.send("GET", "/window")

    def switch_to(self, handle: str) -> None:
        self.send("POST", "/window", {"handle": handle})

    def close_tab(self) -> None:
        self.send("DELETE", "/window")

    def downloaded(self, name: str) -> bytes:
        """The content of a file that a click has begun to download."""
        file = self.folder / name
        deadline = time.monotonic() + TIMEOUT_S
        while not file.exists():  # until then it has another name
            assert time.monotonic() < deadline, f"no {name} was downloaded"
            time.sleep(0.05)
        content = file.read_bytes()
        file.unlink()
        return content

    def devtools(self, command: str, **params: object) -> Any:
        """A command of the Chrome DevTools protocol."""
        return self.send("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def complaints(self) -> list[str]:
        """Warnings and errors on the browser's console since the last call."""
        lines = self.send("POST", "/se/log", {"type": "browser"})
        return [line["message"] for line in lines if line["level"] in ("WARNING", "SEVERE")]
