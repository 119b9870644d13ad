"""Ranged GETs of S3, with little CPU: signatures (version 4), connections that stay open, HTTP/1.1 answers.

What is plain is read here. What is not (a body in chunks, a folded header ...) raises UnusualError: ask a full client.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
import ssl
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPSConnection, IncompleteRead
from typing import IO, Any, NamedTuple

TIMEOUTS_S = (10.0, 60.0)  # to connect; between two packets
HEADERS_MAX = 100
LINE_MAX_BYTES = 8 << 10
BODY_STATUSES = (200, 206)  # whose body is read, and after which a connection is used again

_STATUS = re.compile(rb"HTTP/1\.([01]) ([2-5]\d\d)(?: [^\r\n]*)?\r\n")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\0\r\n]*?)[ \t]*\r\n")
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


class UnusualError(Exception):
    """An answer that is for a full HTTP client to understand."""


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]  # names in lower case
    data: bytes  # of BODY_STATUSES

    @property
    def etag(self) -> str:
        return self.headers.get("etag", "").strip('"')


class Connection(NamedTuple):
    sock: Any
    file: IO[bytes]  # what comes, buffered

    def close(self) -> None:
        self.file.close()
        self.sock.close()


class Connections:
    """Connections to one host that stay open. Thread-safe: who takes one has it alone."""

    def __init__(self, host: str, tls: ssl.SSLContext | None) -> None:
        self.host, self._tls = host, tls
        self.idle: list[Connection] = []

    def get(self, path: str, headers: Mapping[str, str]) -> Answer:
        """The answer to a GET, which must be fit to send: a quoted path, headers with one for the host.

        Raises: UnusualError, OSError, HTTPException (a truncated body).
        """
        request = "".join([f"GET {path} HTTP/1.1\r\n", *(f"{k}: {v}\r\n" for k, v in headers.items()), "\r\n"])
        if request.count("\n") != len(headers) + 2:
            raise UnusualError("a header of two lines")
        sent = request.encode("latin-1")
        while True:
            try:
                connection, kept = self.idle.pop(), True
            except IndexError:
                connection, kept = self._open(), False
            try:
                connection.sock.sendall(sent)
                answer, stays = read_answer(connection.file)
            except BaseException as error:
                connection.close()
                if kept and isinstance(error, ConnectionError):  # a server closes what was idle for long
                    continue
                raise
            if stays:
                self.idle.append(connection)
            else:
                connection.close()
            return answer

    def _open(self) -> Connection:
        connect_s, read_s = TIMEOUTS_S
        if self._tls is None:
            connection = HTTPConnection(self.host, timeout=connect_s)
        else:
            connection = HTTPSConnection(self.host, timeout=connect_s, context=self._tls)
        connection.connect()
        connection.sock.settimeout(read_s)
        return Connection(connection.sock, connection.sock.makefile("rb"))


def read_answer(file: IO[bytes]) -> tuple[Answer, bool]:
    """(an answer, whether another one may follow it).

    Raises: UnusualError, ConnectionError (it ends within the head), IncompleteRead (within the body), OSError.
    """
    begin = _STATUS.fullmatch(line := _line(file))
    if not begin:
        raise UnusualError(f"a status line {line[:40]!r}")
    headers: dict[str, str] = {}
    for _ in range(HEADERS_MAX):
        if (line := _line(file)) == b"\r\n":
            break
        found = _HEADER.fullmatch(line)
        if not found:
            raise UnusualError(f"a header {line[:40]!r}")
        name, value = found[1].decode().lower(), found[2].decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    else:
        raise UnusualError(f"more than {HEADERS_MAX} headers")
    status = int(begin[2])
    if status not in BODY_STATUSES:
        return Answer(status, headers, b""), False
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or "transfer-encoding" in headers:
        raise UnusualError("a body of unknown length")
    data = file.read(int(length))
    if len(data) != int(length):
        raise IncompleteRead(data, int(length) - len(data))
    return Answer(status, headers, data), begin[1] == b"1" and "close" not in headers.get("connection", "").lower()


def _line(file: IO[bytes]) -> bytes:
    line = file.readline(LINE_MAX_BYTES)
    if not line.endswith(b"\n") and len(line) < LINE_MAX_BYTES:
        raise ConnectionResetError("the server closed the connection before its answer was whole")
    return line


def sign(host: str, path: str, headers: Mapping[str, str], credentials: Any, region: str, now: str) -> dict[str, str]:
    """Headers of a GET without a query, and those that sign all of them. Pure.

    `path` is quoted, `credentials` have access_key, secret_key and token, `now` is as in 20261231T235959Z.
    """
    token = {"x-amz-security-token": credentials.token} if credentials.token else {}
    signed = {"host": host, **{name.lower(): value for name, value in headers.items()},
              "x-amz-content-sha256": _EMPTY_SHA256, "x-amz-date": now, **token}  # fmt: skip
    names = sorted(signed)
    lines = [f"{name}:{' '.join(signed[name].split())}\n" for name in names]
    request = f"GET\n{path}\n\n{''.join(lines)}\n{';'.join(names)}\n{_EMPTY_SHA256}"
    scope = f"{now[:8]}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    signature = _hmac(_key(credentials.secret_key, now[:8], region), text).hex()
    of = f"Credential={credentials.access_key}/{scope}, SignedHeaders={';'.join(names)}, Signature={signature}"
    return {**signed, "authorization": f"AWS4-HMAC-SHA256 {of}"}


@functools.lru_cache(maxsize=8)
def _key(secret: str, date: str, region: str) -> bytes:
    """The key of one day."""
    return functools.reduce(_hmac, (date, region, "s3", "aws4_request"), f"AWS4{secret}".encode())


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
