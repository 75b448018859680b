"""A headless Chromium for tests of pages: DevTools' protocol over its pipes, with nothing but the standard library."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """One page of a browser.

    Args:
        folder: for its profile and what it downloads.
    """

    def __init__(self, folder: Path) -> None:
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True, exist_ok=True)
        assert CHROMIUM is not None
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()

        def pipes() -> None:  # DevTools reads descriptor 3 and writes 4
            os.dup2(to_read, 103), os.dup2(to_write, 104)
            os.dup2(103, 3), os.dup2(104, 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]
        command = [CHROMIUM, *flags, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "about:blank"]
        environment = os.environ | {"HOME": str(folder)}
        self._process = subprocess.Popen(
            command, preexec_fn=pipes, close_fds=False, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read), os.close(to_write)
        self._number, self._buffer, self.events = 0, b"", list[dict[str, Any]]()
        targets = self.call("Target.getTargets", session=False)["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", session=False, targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source="sessionStorage.clear()")  # each page is the first one
        self.call("Browser.setDownloadBehavior", session=False, behavior="allow", downloadPath=str(self.downloads))

    def call(self, method: str, session: bool = True, **params: Any) -> Any:
        """Call a method of DevTools and return its result; events on the way are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | ({"sessionId": self._session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._message()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            read = os.read(self._in, 1 << 20)
            assert read, "the browser ended"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, file: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a page of the disk in a window of that size; it has to say that it is ready."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.events = [event for event in self.events if event.get("method") != "Page.loadEventFired"]
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())
        assert self.run("document.documentElement.dataset.ready") == "yes", self.faults()

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page, awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def faults(self) -> list[str]:
        """Return what the console said of errors and warnings, uncaught exceptions, and requests for anything but the page itself."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown" or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning")):
                found.append(json.dumps(params)[:500])
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:", "blob:", "about:")):
                found.append(params["request"]["url"])
        return found

    def picture(self, file: Path, whole: bool = True) -> None:
        """Write a picture of the page."""
        import base64

        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._in), os.close(self._out)
