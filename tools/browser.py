"""A headless Chromium, driven over a pipe: for tests of the status page, and its pictures."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
"""Debian's packages of the first two names have them; the first is the smallest."""

_READS_FROM, _WRITES_TO = 3, 4  # descriptors of a browser with --remote-debugging-pipe
_LIMIT_S = 60.0
_POLL_S = 0.05
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--no-proxy-server", "--remote-debugging-pipe"),
)


class BrowserError(RuntimeError):
    """The browser has ended, does not answer, or was asked what it does not know."""


def browser_program() -> str | None:
    """The path of a browser; None where there is none."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """A context manager around one browser; its pages are tabs of it.

    Args:
        program: Its path.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._events: list[dict[str, Any]] = []
        self._unread = b""
        self._last = 0

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        theirs, ours = _pipe()
        heard, reported = _pipe()

        def connect() -> None:
            os.dup2(theirs, _READS_FROM)
            os.dup2(reported, _WRITES_TO)

        self._process = subprocess.Popen(
            [self._program, *_FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(_READS_FROM, _WRITES_TO),
            preexec_fn=connect,
        )
        os.close(theirs)
        os.close(reported)
        self._reported, self._heard = ours, heard
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._reported)
        os.close(self._heard)
        self._folder.cleanup()

    def page(self, width: int = 1280, height: int = 900, *, dark: bool = False) -> Page:
        """A new tab of a width and a height in pixels."""
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})
        page = Page(self, target, attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            page.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.send("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", {"features": [scheme]})
        return page

    def send(
        self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None
    ) -> dict[str, Any]:
        """Has a method of the DevTools protocol carried out, and returns its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = session
        text = json.dumps(message).encode() + b"\0"
        while text:
            text = text[os.write(self._reported, text) :]
        deadline = time.monotonic() + _LIMIT_S
        while (answer := self._read(deadline)).get("id") != self._last:
            self._events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def events(self, session: str) -> list[dict[str, Any]]:
        """What a page has told of unasked so far."""
        return [event for event in self._events if event.get("sessionId") == session]

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._heard], [], [], left)[0]:
                raise BrowserError(f"{self._program} has not answered for {_LIMIT_S:.0f} s")
            part = os.read(self._heard, 1 << 16)
            if not part:
                raise BrowserError(f"{self._program} has ended")
            self._unread += part
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


class Page:
    """One tab."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self._browser = browser
        self._target = target
        self._session = session

    def send(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """As `Browser.send`, of this page."""
        return self._browser.send(method, parameters, self._session)

    def open(self, url: str) -> None:
        """Goes to an address, and waits until it is there."""
        self.send("Page.navigate", {"url": url})
        self.until(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def close(self) -> None:
        """Closes the tab."""
        self._browser.send("Target.closeTarget", {"targetId": self._target})

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, as JSON has it.

        Raises:
            BrowserError: It throws.
        """
        answer = self.send(
            "Runtime.evaluate",
            {"expression": expression, "returnByValue": True, "awaitPromise": True},
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", details).get("description", str(details)))
        return answer["result"].get("value")

    def until(self, condition: str, limit_s: float = _LIMIT_S) -> None:
        """Waits for an expression to be true."""
        deadline = time.monotonic() + limit_s
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                shown = self.evaluate("document.body.innerText")
                raise BrowserError(f"for {limit_s:.0f} s there was no {condition}; shown:\n{shown}")
            time.sleep(_POLL_S)

    def complaints(self) -> list[str]:
        """Dialogs, exceptions that nobody caught, and errors in the page's log, so far."""
        self.evaluate("0")  # what has been told comes before the answer
        found = []
        for event in self._browser.events(self._session):
            parameters = event.get("params", {})
            if event["method"] == "Page.javascriptDialogOpening":
                found.append(f"dialog: {parameters['message']}")
            elif event["method"] == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(parameters["entry"]["text"])
        return found

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """Writes a PNG of the whole page, or of what is in the window."""
        taken = self.send("Page.captureScreenshot", {"captureBeyondViewport": whole})
        file.write_bytes(base64.b64decode(taken["data"]))


def _pipe() -> tuple[int, int]:
    """A pipe with descriptors that are not those of the browser's."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _WRITES_TO + 1) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
