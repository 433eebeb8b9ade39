"""A page in headless Chromium, over the DevTools protocol: what it drew, what it logged, and what
it asked the network for.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    "--window-size=1366,900",
)


NO_BROWSER = "needs a browser, and none was found"


def browser_path() -> str | None:
    """The path of a Chromium or Chrome; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def require_chromium() -> str:
    """The path of a browser, for a test with the marker `browser`."""
    found = browser_path()
    assert found is not None, "a test that opens a browser must carry the marker `browser`"
    return found


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


class Tab:
    """A page that is open, to look at and to act on.

    Attributes:
        page: What it has done so far.
    """

    def __init__(self, address: str, own: str) -> None:
        self.socket = websocket.create_connection(address, timeout=60)
        self.page, self.own, self.sent = Page(), own, 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the protocol, and note what the page did in the meantime."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.sent:
                return dict(message.get("result", message))
            self._note(message)

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)[
            "result"
        ].get("value")

    def wait(self, expression: str, seconds: float = 60.0) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"this did not become true within {seconds:.0f} s: {expression}; errors:"
                    f" {self.page.errors}"
                )
            time.sleep(0.1)

    def click(self, x: float, y: float) -> None:
        """Move the mouse to a place of the window and click there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click_on(self, selector: str) -> None:
        """Click the middle of an element, brought into view."""
        x, y = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); return"
            " [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.click(x, y)

    def press(self, key: str, code: int) -> None:
        """Press a key that is no letter, such as ("Enter", 13)."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                text="\r" if key == "Enter" else "",
            )

    def type_into(self, selector: str, text: str) -> None:
        """Replace what a field holds, and press Enter."""
        self.click_on(selector)
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text) if text else self.press("Delete", 46)
        self.press("Enter", 13)

    def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url != self.own and not url.startswith(("data:", "blob:")):
                self.page.requests.append(url)
        if message.get("method") == "Runtime.exceptionThrown":
            self.page.errors.append(str(params["exceptionDetails"]))
        if message.get("method") == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "assert",
        ):
            self.page.errors.append(str(params["args"]))
        if message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.page.errors.append(str(params["entry"]))


@contextmanager
def opened(url: str) -> Iterator[Tab]:
    """Open an address in a browser of its own, which ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [require_chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.DEVNULL,
        )
        try:
            tab = Tab(_address(Path(profile)), url)
            for domain in ("Page", "Network", "Runtime", "Log"):
                tab.call(f"{domain}.enable")
            tab.call("Page.navigate", url=url)
            yield tab
            tab.socket.close()
        finally:
            browser.kill()
            browser.wait()


def visit(path: Path, expressions: list[str], ready: str) -> Page:
    """Open a file, wait until the expression `ready` is true, and evaluate some expressions."""
    with opened(path.resolve().as_uri()) as tab:
        tab.wait(ready)
        tab.page.values = [tab.value(expression) for expression in expressions]
    return tab.page


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
    return str(
        next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
    )
