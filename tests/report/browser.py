"""A headless Chromium over its debugging pipe: sets a viewport, opens a page, evaluates JavaScript, takes a picture."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]


def find_chromium():
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


class Browser:
    """One page in one browser. `problems` collects console errors, uncaught exceptions and every request beyond the file itself."""

    def __init__(self, profile):
        read_end, self._write = os.pipe()
        self._read, write_end = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        command = [find_chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{read_end} 4>&{write_end}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", shell, "bash", *command],
            pass_fds=(read_end, write_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_end)
        os.close(write_end)
        self._buffer, self._next, self._session, self.problems = b"", 0, None, []
        target, end = None, time.monotonic() + 60
        while target is None and time.monotonic() < end:  # on a busy machine the page comes after the browser's first answer
            target = next((t["targetId"] for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"), None)
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _receive(self, limit=120.0):
        end = time.monotonic() + limit
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._read, 1 << 16)
            if not data:
                raise RuntimeError("Chromium went away")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(f"exception: {params['exceptionDetails'].get('text')}")
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(f"console: {params['args']}")
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"log: {params['entry']['text']}")
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "about:")):
            self.problems.append(f"request: {params['request']['url']}")

    def open(self, url, width, height=900, *, dark=False, scale=1):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=url)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError):  # the page may be changing
                if self.run("document.readyState === 'complete' && location.href") == url:
                    # Two frames, so that observers and canvases have run.
                    self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{url} does not load")

    def run(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def picture(self, path, *, full=True, clip=None):
        more = {"clip": {**clip, "scale": 1}} if clip else {}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=full, **more)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def move(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def close(self):
        with contextlib.suppress(Exception):
            self.call("Page.close")
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        self._process.wait(60)


def assert_whole(page: Path, profile: Path, charts: set[str], said: str) -> None:
    """Opens a page narrow and wide: nothing fails, overflows or is empty, the charts are there and so is the sentence. Skips without Chromium."""
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    browser = Browser(profile)
    try:
        for width in (380, 1400):
            browser.open(page.as_uri(), width)
            check = browser.run("reportCheck()")
            assert check["failures"] == [] and check["overflow"] == 0 and check["empty"] == 0 and browser.problems == []
            assert charts <= set(check["charts"]) and said in browser.run("document.body.innerText")
    finally:
        browser.close()
