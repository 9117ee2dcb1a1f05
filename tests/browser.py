"""A headless Chromium, driven through chromedriver by the WebDriver protocol, with the standard library only."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


class Browser:
    """One page in one browser."""

    def __init__(self, session: str) -> None:
        self._session = session

    def command(self, name: str, **parameters: Any) -> Any:
        """Run a command of the DevTools protocol."""
        return call(f"{self._session}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file at a width in CSS pixels, in the light or the dark theme."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", features=features)
        call(f"{self._session}/url", {"url": path.resolve().as_uri()})

    def evaluate(self, script: str) -> Any:
        """Return what a script returns."""
        return call(f"{self._session}/execute/sync", {"script": script, "args": []})

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        result = self.command("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(result["data"]))


def call(address: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
    """Send a WebDriver command and return its value."""
    data = None if method == "DELETE" else json.dumps(body or {}).encode()
    request = Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with a new profile; it ends with the context."""
    assert CHROMIUM is not None
    assert CHROMEDRIVER is not None
    log = profile.with_suffix(".log")
    with log.open("wb") as out, subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=out, stderr=out) as driver:
        try:
            root = f"http://127.0.0.1:{wait_for_port(log)}"
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            capabilities = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            session = f"{root}/session/{call(f'{root}/session', capabilities)['sessionId']}"
            try:
                yield Browser(session)
            finally:
                call(session, method="DELETE")
        finally:
            # It sometimes ignores SIGTERM.
            driver.kill()


def wait_for_port(log: Path) -> int:
    """Return the port that chromedriver writes to its log."""
    for _ in range(200):
        parts = log.read_text(errors="replace").partition("started successfully on port ")[2]
        if "." in parts:
            return int(parts.partition(".")[0])
        time.sleep(0.05)
    raise URLError("chromedriver did not start")
