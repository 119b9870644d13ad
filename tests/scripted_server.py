"""An HTTP server that answers by a script: refusals, lost connections, slow and damaged answers, else pictures.

`runpy.run_path` loads it where tests need it: test folders are no packages.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    at_s: float


@dataclass
class Say:
    """One answer. `then`: "" whole, "drop" the connection unanswered, "cut" half of the body, "drip" a byte a time."""

    status: int = 200
    body: bytes = b"\x89PNG of it"
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0
    then: str = ""
    until_asked: int = 0  # waits for so many requests (of all), at most 20 s


def problem(status: int, kind: str, detail: str, **headers: str) -> Say:
    body = {"type": f"urn:rayscale:problem:{kind}", "title": "-", "status": status, "detail": detail,
            "instance": "/v1/upscale", "request_id": "r1"}  # fmt: skip
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Say(status, json.dumps(body).encode(), {"Content-Type": "application/problem+json", **names})


MADE_BY = {"Content-Type": "image/png", "X-Rayscale-Model": "photos:3", "X-Rayscale-Digest": "d" * 64,
           "X-Rayscale-Tiling": "tiled 9", "X-Rayscale-Bits": "16", "X-Rayscale-Provider": "CPUExecutionProvider",
           "X-Request-Id": "r1", "Server-Timing": "decode;dur=1.5, infer;dur=20.25"}  # fmt: skip


class ScriptedServer:
    """`script` holds the next answers, `default` is every other one."""

    def __init__(self, port: int = 0) -> None:
        self.script: list[Say] = []
        self.default = Say(headers=MADE_BY)
        self.asked: list[Asked] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), type("_", (_Handler,), {"owner": self}))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def next(self, asked: Asked) -> Say:
        with self._lock:
            self.asked.append(asked)
            return self.script.pop(0) if self.script else self.default

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ScriptedServer

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        say = self.owner.next(
            Asked(self.command, url.path, dict(parse_qsl(url.query)), headers, body, time.monotonic())
        )
        time.sleep(say.after_s)
        until = time.monotonic() + 20
        while len(self.owner.asked) < say.until_asked and time.monotonic() < until:
            time.sleep(0.01)
        if say.then == "drop":
            self.close_connection = True
            return
        self.send_response(say.status)
        for name, value in {"Content-Type": "text/plain", **say.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(say.body)))
        self.end_headers()
        if say.then == "drip":
            for i in range(len(say.body)):
                self.wfile.write(say.body[i : i + 1])
                time.sleep(0.1)
        elif say.then == "cut":
            self.wfile.write(say.body[: len(say.body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(say.body)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *args: Any) -> None:
        """Quiet."""
