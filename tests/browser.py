"""A headless Chromium, told what to do over a pipe by the Chrome DevTools Protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of so many pixels. `dark`: the user prefers dark colours. `requests`: the addresses that the page asked
    for; `complaints`: what the browser wrote to its console.
    """

    def __init__(self, folder: Path, dark: bool = False, size: tuple[int, int] = (700, 600)):
        assert CHROMIUM
        reads, commands = os.pipe()
        answers, writes = os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            f"--window-size={size[0]},{size[1]}",
        ]
        # The browser reads commands from descriptor 3, and writes answers to 4.
        shell = 'exec "$@" 3<&"$READS" 4>&"$WRITES"'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "-", CHROMIUM, *options, f"--user-data-dir={folder}", "--remote-debugging-pipe"],
            pass_fds=(reads, writes), env=os.environ | {"READS": str(reads), "WRITES": str(writes)},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        self._commands, self._answers = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb")
        self._count, self._session, self._read = 0, None, b""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setEmulatedMedia", features=features)
        for domain in ("Network", "Log", "Runtime"):
            self._ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._commands.close()
        self._answers.close()

    def open(self, url: str) -> None:
        self._ask("Page.navigate", url=url)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of JavaScript."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        end = time.monotonic() + 30
        while not self.run(script):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """Of the whole page, as a PNG."""
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._read:
                part = os.read(self._answers.fileno(), 1 << 16)
                assert part, "the browser has ended"
                self._read += part
            line, _, self._read = self._read.partition(b"\0")
            answer = json.loads(line)
            self._note(answer.get("method", ""), answer.get("params", {}))
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
