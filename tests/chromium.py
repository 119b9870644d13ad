"""Debian's Chromium, driven over its DevTools pipe: no driver, no library. For `runpy.run_path`."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
    "--force-color-profile=srgb", "--hide-scrollbars",
)  # fmt: skip
START = "import os, sys; i, o, *c = sys.argv[1:]; os.dup2(int(i), 3); os.dup2(int(o), 4); os.execvp(c[0], c)"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab. Commands are DevTools' own: https://chromedevtools.github.io/devtools-protocol/."""

    def __init__(self, program: str, profile: Path) -> None:
        (answers, to_us), (to_it, commands) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (to_it, to_us)]  # clear of 3 and 4
        command = [sys.executable, "-c", START, *map(str, theirs), program, *FLAGS, f"--user-data-dir={profile}"]
        with (profile.parent / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen([*command, "about:blank"], pass_fds=theirs, stdout=log, stderr=log)
        for fd in (to_it, to_us, *theirs):
            os.close(fd)
        self._in, self._out = os.fdopen(answers, "rb", 0), os.fdopen(commands, "wb", 0)
        self._buffer, self._id, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result; events that come meanwhile are kept in `events`."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = self._in.read(1 << 16)
            if not data:
                raise RuntimeError("the browser is gone")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited. Raises: RuntimeError when it throws."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def until(self, script: str, timeout_s: float = 15.0) -> None:
        """Wait for an expression to be true."""
        deadline = time.monotonic() + timeout_s
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {script}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def size(self, width: int, height: int, *, phone: bool = False, dark: bool = False, still: bool = True) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=phone,
                  deviceScaleFactor=2 if phone else 1)  # fmt: skip
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = {"prefers-color-scheme": "dark" if dark else "light",
                    "prefers-reduced-motion": "reduce" if still else "no-preference"}  # fmt: skip
        self.call("Emulation.setEmulatedMedia", features=[{"name": k, "value": v} for k, v in features.items()])

    def choose(self, selector: str, *files: Path) -> None:
        """Put files into an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(f) for f in files])

    def centre(self, selector: str) -> tuple[float, float, float, float]:
        """x, y of its middle, its width and its height, once it is scrolled into view."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{ block: 'center', behavior: 'instant' }})")
        box = self.run(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2, r.width, r.height])({element}.getBoundingClientRect())"
        )
        return tuple(box)  # type: ignore[return-value]

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", buttons=1, clickCount=1)

    def click(self, selector: str) -> None:
        x, y, *_ = self.centre(selector)
        self.mouse("Pressed", x, y)
        self.mouse("Released", x, y)

    def touch(self, *path: tuple[float, float]) -> None:
        """A finger put down, moved and lifted."""
        for i, (x, y) in enumerate(path):
            self.call(
                "Input.dispatchTouchEvent", type="touchMove" if i else "touchStart", touchPoints=[{"x": x, "y": y}]
            )
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, name: str, code: int, text: str = "", *, shift: bool = False) -> None:
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code,
                      modifiers=8 * shift, **extra)  # fmt: skip

    def type(self, text: str) -> None:
        for letter in text:
            self.press(letter, ord(letter.upper()), letter)

    def chosen_by_key(self, name: str, code: int, text: str, *files: Path, timeout_s: float = 5.0) -> None:
        """Press a key on a file input, and put files into the chooser that it opens."""
        self.call("Page.setInterceptFileChooserDialog", enabled=True)
        seen, deadline = len(self.events), time.monotonic() + timeout_s
        self.press(name, code, text)
        while not (opened := [e for e in self.events[seen:] if e.get("method") == "Page.fileChooserOpened"]):
            assert time.monotonic() < deadline, f"{name} opened no file chooser"
            self.run("new Promise(requestAnimationFrame)")
        node = opened[0]["params"]["backendNodeId"]
        self.call("DOM.setFileInputFiles", backendNodeId=node, files=[str(f) for f in files])
        self.call("Page.setInterceptFileChooserDialog", enabled=False)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """What the page's console said that is a warning or worse: errors, refusals by its security policy."""
        self.run("1")
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            if event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
        return found

    def close(self) -> None:
        self._out.close()  # it ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._in.close()
