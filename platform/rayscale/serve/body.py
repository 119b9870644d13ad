"""What a request carries: a picture as the body itself, parts of a form, or JSON with base64. Bounded before read."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from rayscale.errors import ConfigError, ImageError, MediaTypeError, TooLargeError, nearest
from rayscale.serve.lean import header
from rayscale.serve.problems import BusyError

T = TypeVar("T")

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a broken form is the client's, and told to it

FORM, JSON = "multipart/form-data", "application/json"
_BESIDE = 64 << 10  # bytes of names, headers and punctuation around the pictures
_VALUES = 1000  # in JSON, beside eight a picture
_SHOW = "e.g. curl --data-binary @photo.jpg, or curl -F image=@photo.jpg"

Parts = Mapping[str, list[bytes]]
"""Encoded pictures by the name of their part, in the order they came."""


@dataclass(frozen=True)
class Body:
    """A body as it came, and its Content-Type. Splitting it takes time: not on an event loop."""

    data: bytes
    content_type: str = ""

    @property
    def kind(self) -> str:
        return self.content_type.partition(";")[0].strip().lower()

    def parts(self, most: Mapping[str, int]) -> Parts:
        """The pictures by name; `most` says which names there may be, how often, and first what a raw body is.

        Raises: ConfigError (no such part, too many, broken JSON), MediaTypeError, ImageError for broken base64.
        """
        if (kind := self.kind) == FORM:
            found = _form(self.data, self.content_type, sum(most.values()))
        elif kind == JSON:
            return json_parts(self.json(sum(most.values())), most)
        else:
            found = [(next(iter(most)), self.data)]
        return _gathered(found, most)

    def json(self, pictures: int) -> dict[str, Any]:
        """At most so many in it. Raises: ConfigError for what is no JSON object, or holds more than they need."""
        # Of many small values each costs the parser fifty bytes and holds all threads up; base64 has none of these.
        if sum(map(self.data.count, (b",", b"[", b"{"))) > _VALUES + 8 * pictures:
            rule = f"holds too many values for {pictures} pictures"
            raise ConfigError("body", f"{len(self.data)} bytes", rule, "send pictures in base64, settings in the query")
        try:
            value = json.loads(self.data)
        except (ValueError, RecursionError) as error:
            raise ConfigError("body", error, "is no JSON", "send an object, as /docs shows") from None
        if not isinstance(value, dict):
            raise ConfigError("body", type(value).__name__, "must be a JSON object", "see /docs")
        return value


def json_parts(value: Mapping[str, Any], most: Mapping[str, int]) -> Parts:
    """Base64 pictures of an object, one a name or, of several, a list of them. Raises: as `Body.parts`."""
    found = []
    for name, texts in value.items():
        for text in texts if isinstance(texts, list) and most.get(name, 2) > 1 else [texts]:
            if not isinstance(text, str):
                raise ConfigError(f"body.{name[:80]}", type(text).__name__, "must be base64 in a string",
                                  "settings stand in the query")  # fmt: skip
            found.append((name, _from_base64(name[:80], text)))
    return _gathered(found, most)


def _gathered(found: Iterable[tuple[str, bytes]], most: Mapping[str, int]) -> Parts:
    parts: dict[str, list[bytes]] = {}
    for name, data in found:
        if name not in most:
            name = name[:80]
            raise ConfigError("body", name, "there is no such part", nearest(name, most))
        parts.setdefault(name, []).append(data)
        if len(parts[name]) > most[name]:
            raise ConfigError("body", name, f"at most {most[name]} are read", "send fewer")
    return parts


def only(parts: Parts, name: str) -> bytes:
    """The one part of that name. Raises: ConfigError."""
    if name not in parts:
        raise ConfigError("body", ", ".join(parts) or "(nothing)", f"has no {name}", _SHOW)
    return parts[name][0]


def _from_base64(name: str, text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(name, error, "is no base64", "send the picture's bytes as standard base64") from None


def _form(data: bytes, content_type: str, most: int) -> list[tuple[str, bytes]]:
    """Every part by its name, at most so many. The parser keeps to the standard: nothing is guessed."""
    boundary = parse_options_header(content_type.encode())[1].get(b"boundary", b"")
    if not boundary:
        raise MediaTypeError("Content-Type", content_type, "names no boundary", _SHOW)
    parts: list[tuple[str, bytes]] = []
    field, value, disposition = bytearray(), bytearray(), b""
    pieces: list[bytes] = []
    ended = False

    def header() -> None:
        nonlocal disposition
        if bytes(field).lower() == b"content-disposition":
            disposition = bytes(value)
        field.clear()
        value.clear()

    def begin() -> None:
        nonlocal disposition
        disposition = b""
        pieces.clear()
        if len(parts) > most:  # whatever their names: one more is enough to refuse them by
            raise ConfigError("body", f"more than {most} parts", f"at most {most} are read", "send fewer")

    def end() -> None:
        name = parse_options_header(disposition)[1].get(b"name", b"").decode("utf-8", "replace")
        parts.append((name, b"".join(pieces)))

    def whole() -> None:
        nonlocal ended
        ended = True

    parser = None
    try:
        parser = MultipartParser(boundary, {
            "on_part_begin": begin, "on_part_data": lambda d, i, j: pieces.append(d[i:j]), "on_part_end": end,
            "on_header_field": lambda d, i, j: field.extend(d[i:j]),
            "on_header_value": lambda d, i, j: value.extend(d[i:j]), "on_header_end": header, "on_end": whole,
        })  # fmt: skip
        parser.write(data)
        parser.finalize()
    except FormParserError as error:
        raise ConfigError("body", error, "is no multipart form", _SHOW) from None
    if not ended:
        raise ConfigError("body", f"{len(data)} bytes", "the form's last boundary is missing", "send the whole of it")
    return parts


class Held:
    """Bytes of bodies that a gateway holds, all requests together: uploads must not fill its memory."""

    def __init__(self, max_bytes: int, backlog_s: Callable[[], float]) -> None:
        """`backlog_s`: when those that are here will be done."""
        self._max_bytes, self._backlog_s = max_bytes, backlog_s
        self.bytes = 0

    def check(self, more: int) -> None:
        """Raises: BusyError where there is no room for so many more."""
        if self.bytes + more > self._max_bytes:
            raise BusyError(
                "bodies",
                f"{self.bytes + more} bytes",
                f"at most {self._max_bytes} bytes of requests are held at once",
                "try again later",
                retry_after_s=self._backlog_s(),
            )


async def read_body(request: Request, max_bytes: int, timeout_s: float, held: Held) -> Body:
    """The whole body, of at most `max_bytes` of pictures. Who gets it takes its length from `held` in the end.

    Raises: TooLargeError and BusyError, before reading it where its length is declared; MediaTypeError;
        HTTPException 408.
    """
    if encoding := header(request.scope, b"content-encoding"):
        raise MediaTypeError("Content-Encoding", encoding, "bodies are not compressed", "send the picture as it is")
    body = Body(b"", header(request.scope, b"content-type"))
    if (kind := body.kind) == FORM:
        max_bytes += _BESIDE
    elif kind == JSON:
        max_bytes += max_bytes // 3 + _BESIDE
    elif kind.startswith("multipart/"):
        raise MediaTypeError("Content-Type", kind, f"of multipart, {FORM} is read", _SHOW)
    declared = header(request.scope, b"content-length")
    if declared.isdigit():  # nothing is set aside for it: who declares much and sends nothing would keep others out
        if int(declared) > max_bytes:
            raise _too_long(int(declared), max_bytes)
        held.check(int(declared))
    chunks, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                if size + len(chunk) > max_bytes:
                    raise _too_long(size + len(chunk), max_bytes)
                if chunk:  # the last is empty: with it, one chunk would be copied
                    held.check(len(chunk))
                    chunks.append(chunk)
                    size += len(chunk)
                    held.bytes += len(chunk)
    except BaseException as error:
        held.bytes -= size
        if not isinstance(error, TimeoutError):
            raise
        rule = f"the body did not arrive within {timeout_s:.0f} s"
        raise HTTPException(408, f"body: {rule}; send a smaller file") from None
    return Body(b"".join(chunks), body.content_type)


def _too_long(size: int, max_bytes: int) -> TooLargeError:
    return TooLargeError("body", f"{size} bytes", f"at most {max_bytes} bytes are read", "send a smaller file")


class ClientGone(Exception):  # noqa: N818 - no error of ours
    """Nobody waits for the answer any more."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`, cancelled when the client hangs up. The body must have been read. Raises: ClientGone."""
    gone, task = False, asyncio.current_task()
    assert task is not None

    async def hang_up() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.ensure_future(hang_up())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and not task.uncancel():  # nobody else wants it cancelled
            raise ClientGone from None
        raise
    finally:
        watching.cancel()
