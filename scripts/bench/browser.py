"""A headless Chromium, driven over its debugging pipe: no package, no port. To look at pages in tests and benches."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio", "--no-default-browser-check",
)  # fmt: skip
# It reads commands from its descriptor 3 and answers on 4: ours are put there, whatever their numbers are.
_SHIM = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class PageError(RuntimeError):
    """The browser or a page's script failed; the message says what it said."""


def find_chromium() -> str | None:
    """Return the browser's program; None when this machine has none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser of its own; a context manager. Raises PageError when there is no Chromium.

    at_most_seconds: then it is killed, so that a hung browser ends no test run.
    """

    def __init__(self, *, at_most_seconds: float = 120) -> None:
        program = find_chromium()
        if program is None:
            raise PageError(f"no browser: none of {', '.join(NAMES)} is installed")
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        shim = [sys.executable, "-I", "-S", "-c", _SHIM, str(to_browser), str(from_browser), program]
        self._process = subprocess.Popen(
            [*shim, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._number = 0
        self._buffer = b""
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        self.errors: list[str] = []
        """What its scripts threw, and what the console was told as an error or a refused policy."""
        self._deadline = threading.Timer(at_most_seconds, self._process.kill)
        self._deadline.start()
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session: str | None = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadline.cancel()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Run a command of the DevTools protocol on the page and return its result. Raises PageError."""
        return self._call(method, session=self._session, **values)

    def _call(self, method: str, *, session: str | None = None, **values: Any) -> dict[str, Any]:
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if session is not None:
            command["sessionId"] = session
        data = json.dumps(command).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._write, data) :]
        except BrokenPipeError as error:
            raise PageError(f"{method}: the browser has ended with {self._process.wait(10)}") from error
        while True:
            answer = self._receive(method)
            if answer.get("id") != self._number:
                self._note(answer)
            elif "error" in answer:
                raise PageError(f"{method}: {answer['error']['message']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self, method: str) -> dict[str, Any]:
        pieces: deque[bytes] = deque([self._buffer])
        while b"\0" not in pieces[-1]:
            data = os.read(self._read, 1 << 20)
            if not data:
                raise PageError(f"{method}: the browser has ended with {self._process.wait(10)}")
            pieces.append(data)
        raw, _, self._buffer = b"".join(pieces).partition(b"\0")
        answer: dict[str, Any] = json.loads(raw)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        values, method = event.get("params", {}), event.get("method")
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.errors.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")

    def window(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Set the size in CSS pixels, the scheme of colours and the pixels per CSS pixel."""
        phone = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str) -> None:
        """Go to an address; does not wait for more than the page itself."""
        answer = self.call("Page.navigate", url=address)
        if "errorText" in answer:
            raise PageError(f"{address}: {answer['errorText']}")

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression. Raises PageError when it throws."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(f"{script}: {details.get('exception', {}).get('description', details['text'])}")
        return answer["result"].get("value")

    def wait_for(self, script: str, *, timeout_seconds: float = 30) -> Any:
        """Return the expression's value as soon as it is true. Raises PageError when it is not in time."""
        deadline, value, said = time.monotonic() + timeout_seconds, None, ""
        while not value:
            try:
                value = self.run(script)
            except PageError as error:  # the page that it asks is just being replaced
                said = str(error)
            if not value and time.monotonic() > deadline:
                raise PageError(f"{script}: not true after {timeout_seconds} s; {said} {self.errors}")
            time.sleep(0.01)
        return value

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key, as `KeyboardEvent.key` names it."""
        text = {"Enter": "\r", " ": " "}.get(key)
        values: dict[str, Any] = {"key": key, "code": key, "modifiers": 8 if shift else 0}
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        values["windowsVirtualKeyCode"] = codes.get(key, 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", **values, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def click(self, selector: str) -> None:
        """Click the middle of the first element that a CSS selector finds. Raises PageError when there is none."""
        place = self.run(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)}); if (!found) return null;"
            "found.scrollIntoView({block: 'center'}); const box = found.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        if place is None:
            raise PageError(f"{selector}: no such element")
        at = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        self.call("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def screenshot(self, path: Path, *, whole: bool = False, height: int | None = None) -> None:
        """Write what is seen as PNG. whole: the whole page; height: only so much of it, in CSS pixels."""
        values: dict[str, Any] = {"format": "png"}
        if whole or height is not None:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            tall = size["height"] if height is None else min(height, size["height"])
            clip = {"x": 0, "y": 0, "width": size["width"], "height": tall, "scale": 1}
            values |= {"captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **values)["data"]))
