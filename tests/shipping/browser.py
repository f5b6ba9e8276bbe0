"""A headless Chromium over its debugging pipe: pages opened, clicked and read; what they log and ask for is kept."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def program() -> str | None:
    """The browser on this machine, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab. logs: errors and warnings of the console, and uncaught exceptions; asked: every address requested."""

    def __init__(self, command: str):
        self.profile = tempfile.mkdtemp(prefix="browser-")
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()

        def pipes() -> None:
            # 3 and 4 are where the browser looks; away from there first, lest one close the other
            first, second = os.dup2(to_read, 100), os.dup2(to_write, 101)
            os.dup2(first, 3)
            os.dup2(second, 4)

        words = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        words += f" --disable-background-networking --remote-debugging-pipe --user-data-dir={self.profile}"
        nowhere = subprocess.DEVNULL
        line = [command, *words.split()]
        self.process = subprocess.Popen(line, preexec_fn=pipes, close_fds=False, stdout=nowhere, stderr=nowhere)
        os.close(to_read)
        os.close(to_write)
        self.count, self.rest = 0, b""
        self.logs: list[str] = []
        self.asked: list[str] = []
        self.session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's answer."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next(60)
            if got.get("id") == self.count:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']}")
                return got["result"]

    def _next(self, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read], [], [], max(until - time.monotonic(), 0))
            part = os.read(self.read, 1 << 20) if ready else b""
            if not part:
                raise TimeoutError("the browser says nothing")
            self.rest += part
        raw, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.logs.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.logs.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.logs.append(json.dumps(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])

    def open(self, address: str | Path) -> None:
        """Open a page and wait until it has loaded; logs and asked begin anew."""
        self.logs, self.asked = [], []
        self.send("Page.navigate", url=address.resolve().as_uri() if isinstance(address, Path) else address)
        self.wait("document.readyState == 'complete'")

    def run(self, script: str) -> Any:
        """The value of a script, as JSON has it."""
        got = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(json.dumps(got["exceptionDetails"]))
        return got["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        """Until a script is true."""
        until = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > until:
                raise TimeoutError(f"{script} stayed false; logged: {self.logs}")
            time.sleep(0.05)

    def headings(self) -> list[str]:
        return list(self.run("[...document.querySelectorAll('h1, h2, h3')].map(h => h.textContent.trim())"))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.write)
        os.close(self.read)
        shutil.rmtree(self.profile, ignore_errors=True)
