"""A headless Chromium over its debugging pipe: what a page looks like, asks for and complains of. No driver needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PATIENCE_S = 120.0


def chromium() -> str | None:
    """Path of an installed Chromium or Chrome; None where there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """One page of a browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._number, self._pending, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []

    def start(self) -> None:
        """Opens an empty page, and listens to its network, its console and its log."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def open(self, address: str, width: int, height: int = 800) -> None:
        """Loads an address at a width in pixels, and waits until it has loaded."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.send("Page.navigate", url=address)
        self._until(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events))

    def value(self, script: str) -> Any:
        """The value of a JavaScript expression on the page."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Writes a PNG of the whole page."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for, without those that hold their own content."""
        sent = (one["params"]["request"]["url"] for one in self.events if one["method"] == "Network.requestWillBeSent")
        return [address for address in sent if not address.startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        """What stands in the console: errors, warnings and refused content."""
        named = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(one["params"])[:300] for one in self.events if one["method"] in named]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Gives a command and waits for its answer. Raises RuntimeError if it fails."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": params, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []
        self._until(lambda: bool(answers), answers)
        if "error" in answers[0]:
            raise RuntimeError(f"{method}: {answers[0]['error']}")
        result: dict[str, Any] = answers[0]["result"]
        return result

    def _until(self, done: Callable[[], bool], answers: list[dict[str, Any]] | None = None) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not done():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                raise RuntimeError(f"the browser did not answer in {_PATIENCE_S:g} s")
            content = os.read(self._from, 1 << 20)
            if not content:
                raise RuntimeError("the browser has ended")
            *messages, self._pending = (self._pending + content).split(b"\0")
            for message in map(json.loads, messages):
                if "method" in message:
                    self.events.append(message)
                elif answers is not None and message["id"] == self._number:
                    answers.append(message)


@contextmanager
def page_of_browser(program: str, profile: Path) -> Iterator[Page]:
    """Yields a page of a browser that ends with the block; `profile` is its directory."""
    read_by_browser, to_browser = os.pipe()
    from_browser, written_by_browser = os.pipe()

    def as_3_and_4() -> None:  # where a browser with a debugging pipe reads and writes
        reading, writing = os.dup(read_by_browser), os.dup(written_by_browser)
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    command = [program, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(
        command, close_fds=False, preexec_fn=as_3_and_4, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(read_by_browser)
        os.close(written_by_browser)
        page = Page(to_browser, from_browser)
        try:
            page.start()
            yield page
        finally:
            process.kill()
            os.close(to_browser)
            os.close(from_browser)
