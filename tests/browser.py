"""A page in headless Chromium, over the DevTools protocol: what it drew, what it logged, and what it asked the network for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import websocket

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--remote-allow-origins=*", "--window-size=1366,900",
)  # fmt: skip


def require_chromium() -> str:
    """The browser's path; without one the test is skipped, except in CI, where it fails."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        return found
    if os.environ.get("CI"):
        pytest.fail("CI must test the page in a browser, but Chromium is not installed")
    pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")


@dataclass
class Page:
    """What a page did.

    Attributes:
        values: Result of each expression.
        errors: Console errors and uncaught exceptions.
        requests: Addresses that were asked for, other than the page itself and data inside it.
    """

    values: list[Any] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class _Tab:
    def __init__(self, address: str, page: Page, own: str) -> None:
        self.socket = websocket.create_connection(address, timeout=60)
        self.page, self.own, self.sent = page, own, 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.sent:
                return dict(message.get("result", message))
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url != self.own and not url.startswith(("data:", "blob:")):
                self.page.requests.append(url)
        if message.get("method") == "Runtime.exceptionThrown":
            self.page.errors.append(str(params["exceptionDetails"]))
        if message.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.page.errors.append(str(params["args"]))
        if message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.page.errors.append(str(params["entry"]))


def visit(path: Path, expressions: list[str], ready: str) -> Page:
    """Open a file, wait until the expression `ready` is true, and evaluate some expressions."""
    page, own = Page(), path.resolve().as_uri()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen([require_chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL)
        try:
            tab = _Tab(_address(Path(profile)), page, own)
            for domain in ("Page", "Network", "Runtime", "Log"):
                tab.call(f"{domain}.enable")
            tab.call("Page.navigate", url=own)
            deadline = time.monotonic() + 60
            while not _value(tab, ready):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the page was not ready within 60 s: {ready}; errors: {page.errors}")
                time.sleep(0.2)
            page.values = [_value(tab, expression) for expression in expressions]
            tab.socket.close()
        finally:
            browser.kill()
            browser.wait()
    return page


def _value(tab: _Tab, expression: str) -> Any:
    return tab.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


def _address(profile: Path) -> str:
    import urllib.request

    port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
    while not (port_file.exists() and port_file.read_text().strip()):
        if time.monotonic() > deadline:
            raise TimeoutError("Chromium did not start within 60 s")
        time.sleep(0.1)
    port = port_file.read_text().split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
        targets = json.load(answer)
    return str(next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"))
