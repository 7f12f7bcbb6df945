"""A headless Chromium that tests drive by its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


class Browser:
    """One page.

    Attributes:
        requested: addresses that it asked for.
    """

    def __init__(self, folder: Path, width: int = 1100, height: int = 800) -> None:
        command = [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"]
        profile = folder / "profile"
        self.process = subprocess.Popen(
            [*command, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port = self._until(lambda: (profile / "DevToolsActivePort").read_text().splitlines()[0])
        pages = self._until(lambda: [each for each in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json")) if each["type"] == "page"])
        self.socket = connect(pages[0]["webSocketDebuggerUrl"], max_size=2**26)
        self.number, self.requested = 0, list[str]()
        for method in ("Page.enable", "Network.enable", "Runtime.enable", "DOM.enable"):
            self.send(method)
        self.size(width, height)

    def _until(self, found: Any, seconds: float = 30) -> Any:
        end = time.monotonic() + seconds
        while True:
            try:
                if value := found():
                    return value
            except (OSError, IndexError, ValueError):
                pass
            if time.monotonic() > end:
                raise AssertionError(f"{found} did not come in {seconds} s")
            time.sleep(0.05)

    def send(self, method: str, **parameters: Any) -> Any:
        """Send a command; returns its result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=30))
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return message["result"]

    def size(self, width: int, height: int, phone: bool = False) -> None:
        """Set the size of the page's window."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise's is waited for."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> Any:
        """Wait until a JavaScript expression is true; returns its value."""
        return self._until(lambda: self.run(expression), seconds)

    def open(self, url: str) -> None:
        """Go to an address."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def press(self, key: str, count: int = 1) -> None:
        """Press a key: Tab, Enter, Space."""
        code = {"Tab": 9, "Enter": 13, "Space": 32}[key]
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        for _ in range(count):
            for kind in ("keyDown", "keyUp"):
                typed = text if kind == "keyDown" else ""
                self.send("Input.dispatchKeyEvent", type=kind, key=" " if key == "Space" else key, code=key, windowsVirtualKeyCode=code, text=typed)

    def upload(self, selector: str, file: Path) -> None:
        """Choose a file in an input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def picture(self, file: Path) -> None:
        """Write what is seen to a PNG file."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End it."""
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
