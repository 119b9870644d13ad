"""An HTTP proxy before an S3 server that damages its answers, by a script or by chance (of a seed: always the same).

`runpy.run_path` loads it where tests need it: test folders are no packages.
"""

from __future__ import annotations

import http.client
import random
import socket
import ssl
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = (  # and, by a script alone, "chunks": a good answer whose length is not told before
    "503",  # SlowDown, and nothing was done
    "reset",  # the connection, and nothing was done
    "lost",  # the request is done, the connection ends without an answer
    "cut",  # half of the body, then the connection ends
    "flip",  # one bit of the body
    "slow",  # the body in pieces
    "page",  # an error's XML with status 200
    "other",  # the answer of another object, as long, that was there for a moment; 412 to who asks for the first one
)


class FaultProxy:
    """Forwards to `upstream`. `script` says what goes wrong with the next requests; after it chance does."""

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.script: list[str] = []  # kinds; "" is a good answer
        self.seen: list[str] = []  # method and kind, such as "GET cut"
        self.asked: list[str] = []  # path and range of the same
        self.share, self.seed, self.kinds = 0.0, 0, KINDS  # of GETs that are damaged by chance
        self._times: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("_", (_Handler,), {"proxy": self}))
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, method: str, what: str) -> tuple[str, random.Random]:
        """What happens to this request, and where. Chance looks at it and how often it was asked, not at the order."""
        with self._lock:
            self._times[what] += 1
            luck = random.Random(f"{self.seed} {method} {what} {self._times[what]}")
            by_chance = method == "GET" and luck.random() < self.share
            kind = self.script.pop(0) if self.script else luck.choice(self.kinds) if by_chance else ""
            self.seen.append(f"{method} {kind}".strip())
            self.asked.append(what)
            return kind, luck


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def forward(self) -> None:
        kind, luck = self.proxy.fault(self.command, f"{self.path} {self.headers.get('Range')}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if kind == "503":
            self.answer(503, {}, _error("SlowDown"))
        elif kind == "page":
            self.answer(200, {"Content-Type": "application/xml"}, _error("InternalError"))
        elif kind == "other" and self.headers.get("If-Match"):
            self.answer(412, {}, _error("PreconditionFailed"))
        elif kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
        else:
            self.damage(kind, luck, *self.ask(body))

    def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.proxy.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers))
        reply = upstream.getresponse()
        data = reply.read()
        upstream.close()
        return reply.status, {k: v for k, v in reply.getheaders() if k.lower() != "transfer-encoding"}, data

    def damage(self, kind: str, luck: random.Random, status: int, headers: dict[str, str], data: bytes) -> None:
        if kind == "lost":
            self.close_connection = True
            return
        if kind == "flip" and data:
            at = luck.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << luck.randrange(8)]) + data[at + 1 :]
        if kind == "other":
            data = luck.randbytes(len(data))
            headers = {name: value for name, value in headers.items() if "checksum" not in name.lower()}
            headers["ETag"] = f'"{luck.randbytes(16).hex()}"'
        if kind == "chunks":
            data, headers = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data), {**headers, "Transfer-Encoding": "chunked"}
        self.answer(status, headers, data, cut=kind == "cut", pieces=4 if kind == "slow" else 1)

    def answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False, pieces: int = 1) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "date", "server"):
                self.send_header(name, value)
        if "Transfer-Encoding" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        sent = data[: len(data) // 2] if cut else data
        size = -(-len(sent) // pieces) or 1
        for start in range(0, len(sent), size):
            if start:
                time.sleep(0.02)
            self.wfile.write(sent[start : start + size])
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault of the test</Message></Error>".encode()
