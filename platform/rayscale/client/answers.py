"""What a server's answers are, as values, and how they are read. What a newer server adds is left out."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from rayscale import imaging
from rayscale.client.exchange import Spent
from rayscale.errors import IntegrityError
from rayscale.imaging import U8
from rayscale.storage import whole

T = TypeVar("T")
Read = Callable[[httpx.Response, Spent], T]

_NUMBER = re.compile(r"[0-9]{1,18}")  # "²" is a digit to Python, and no number to `int`


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Who answered, and how long it took."""

    model: str  # "" where no model took part
    version: int | None
    digest: str  # SHA-256 of the artifact
    provider: str  # ONNX Runtime's execution provider
    request_id: str
    timing_ms: Mapping[str, float] = field(repr=False)  # the server's own: decode, queue, infer, encode
    elapsed_s: float  # here, attempts and waits included
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Picture(Answer):
    """An encoded picture."""

    data: bytes = field(repr=False)
    media_type: str
    tiling: str = ""  # "whole", or "tiled" and the number of tiles; "" of a generated one
    bits: int | None = None  # of its samples, 8 or 16; None of a generated one

    @property
    def pixels(self) -> U8:
        """Decoded: u8[h, w, 3]. Raises: ImageError."""
        return imaging.decode_rgb(self.data, name="answer")

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all. Raises: MissingError, ResourceError."""
        with whole(Path(path)) as temporary:
            temporary.write_bytes(self.data)


@dataclass(frozen=True, kw_only=True)
class Generated(Picture):
    """A picture of a seed; with the same model, seed and index it is made again."""

    seed: int  # asked for, or drawn by the server
    index: int


@dataclass(frozen=True, kw_only=True)
class Embedding(Answer):
    """A picture as a vector: f32[dimensions]."""

    vector: NDArray[np.float32] = field(repr=False)
    others: Mapping[str, NDArray[np.float32]] = field(repr=False)  # further outputs of the model, by name


@dataclass(frozen=True, kw_only=True)
class Similarity(Answer):
    """How alike two pictures are, by measure. None: infinite (psnr of equal ones), or nothing to go by."""

    measures: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One version that the server knows of."""

    name: str
    version: int
    aliases: tuple[str, ...]
    digest: str
    ready: bool
    canary: Mapping[str, float] = field(default_factory=dict)  # alias -> share of its requests
    kind: str | None = None
    role: str | None = None  # the route that takes it
    family: str | None = None
    scale: int | None = None
    classes: tuple[str, ...] | None = None
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelVersion(ModelInfo):
    """One version with its card, where it is loaded."""

    provider: str | None = None
    card: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Models:
    """What is served. `defaults` by route, where no model is named; `held` aliases are not followed yet, and why."""

    generation: int
    default: str | None = None  # of upscaling
    defaults: Mapping[str, str]
    models: tuple[ModelInfo, ...]
    held: Mapping[str, str]
    watched: Mapping[str, str] = field(default_factory=dict)  # canaries and new champions, and how they do


@dataclass(frozen=True, kw_only=True)
class ModelDetail:
    """One model: where its aliases lead, as alias -> share by version, and its versions, newest first."""

    name: str
    routes: Mapping[str, Mapping[str, float]]
    versions: tuple[ModelVersion, ...]
    held: Mapping[str, str]


# --- reading


def picture(response: httpx.Response, spent: Spent) -> Picture:
    bits = response.headers.get("X-Rayscale-Bits", "")
    return Picture(
        **_file(response),
        **_about(response, spent),
        tiling=response.headers.get("X-Rayscale-Tiling", ""),
        bits=int(bits) if _NUMBER.fullmatch(bits) else None,
    )


def generated(num: int, first: int, seed: int | None) -> Read[tuple[Generated, ...]]:
    """Of `num` pictures, one of which comes as itself and several in JSON; the server says what it drew as `seed`."""

    def read(response: httpx.Response, spent: Spent) -> tuple[Generated, ...]:
        files = [_file(response)] if num == 1 else [_decoded(response, row) for row in _rows(response, num)]
        told = response.headers.get("X-Rayscale-Seed", "")
        known = bool(_NUMBER.fullmatch(told))
        if not known and seed is None:
            raise strange(response, "does not tell its seed")
        about = {**_about(response, spent), "seed": int(told) if known else seed}
        return tuple(Generated(**file, **about, index=index) for index, file in enumerate(files, first))

    return read


def embeddings(num: int) -> Read[tuple[Embedding, ...]]:
    def one(response: httpx.Response, row: Mapping[str, Any], about: Mapping[str, Any]) -> Embedding:
        found = {name: array for name, value in row.items() if (array := _array(value)) is not None}
        vector = found.pop("embedding", np.empty(0, np.float32))
        if vector.ndim != 1 or not vector.size:
            raise strange(response, "holds no embedding")
        return Embedding(vector=vector, others=found, **about)

    def read(response: httpx.Response, spent: Spent) -> tuple[Embedding, ...]:
        rows, about = _rows(response, num), _about(response, spent)
        return tuple(one(response, row, about) for row in rows)

    return read


def similarities(num: int) -> Read[tuple[Similarity, ...]]:
    def read(response: httpx.Response, spent: Spent) -> tuple[Similarity, ...]:
        rows, about = _rows(response, num), _about(response, spent)
        return tuple(Similarity(measures={k: v for k, v in row.items() if k != "index"}, **about) for row in rows)

    return read


def only(read: Read[tuple[T, ...]]) -> Read[T]:
    """Of an answer about one, that one."""
    return lambda response, spent: read(response, spent)[0]


def models(response: httpx.Response, _: Spent) -> Models:
    return _document(response, "list of models", lambda found: _known(Models, found, models=ModelInfo))


def model(response: httpx.Response, _: Spent) -> ModelDetail:
    return _document(response, "model", lambda found: _known(ModelDetail, found, versions=ModelVersion))


def strange(response: httpx.Response, rule: str) -> IntegrityError:
    """What is raised of an answer that is none of ours."""
    shown = f"{response.headers.get('content-type', 'no type')}, {len(response.content)} bytes"
    return IntegrityError(f"answer of {response.request.url.path}", shown, rule, "is this a rayscale server?")


def _about(response: httpx.Response, spent: Spent) -> dict[str, Any]:
    """The fields of `Answer`."""
    model, _, version = response.headers.get("X-Rayscale-Model", "").rpartition(":")
    if not _NUMBER.fullmatch(version):
        model, version = response.headers.get("X-Rayscale-Model", ""), ""
    timing = re.findall(r"([\w-]+);dur=(\d+(?:\.\d+)?)(?![\w.])", response.headers.get("Server-Timing", ""))
    return {
        "model": model,
        "version": int(version) if version else None,
        "digest": response.headers.get("X-Rayscale-Digest", ""),
        "provider": response.headers.get("X-Rayscale-Provider", ""),
        "request_id": response.headers.get("X-Request-Id", ""),
        "timing_ms": {name: float(value) for name, value in timing},
        "elapsed_s": spent.elapsed_s,
        "attempts": spent.attempts,
    }


def _file(response: httpx.Response) -> dict[str, Any]:
    kind = response.headers.get("content-type", "")
    if not kind.startswith("image/"):
        raise strange(response, "is no picture")
    return {"data": response.content, "media_type": kind}


def _decoded(response: httpx.Response, row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        data = base64.b64decode(row["b64_json"], validate=True)
    except (KeyError, TypeError, binascii.Error) as error:
        raise strange(response, f"holds no pictures ({error})") from None
    return {"data": data, "media_type": f"image/{imaging.read_header(data, name='answer').format}"}


def _rows(response: httpx.Response, num: int) -> list[dict[str, Any]]:
    """Of the list that the answer is: one for each of the `num` that were asked about."""
    rows = _object(response).get("data")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise strange(response, "is no list of results")
    if len(rows) != num:
        raise strange(response, f"holds {len(rows)} results, {num} were asked for")
    return rows


def _array(value: object) -> NDArray[np.float32] | None:
    """f32 of any shape; None of what is no list of numbers."""
    try:
        return np.asarray(value, np.float32) if isinstance(value, list) else None
    except (TypeError, ValueError):
        return None


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise strange(response, "is no JSON object")
    return found


def _document(response: httpx.Response, what: str, read: Callable[[Mapping[str, Any]], T]) -> T:
    found = _object(response)
    try:
        return read(found)
    except (TypeError, AttributeError) as error:
        raise strange(response, f"is no {what} ({error})") from None


def _known(cls: type[T], found: Mapping[str, Any], **nested: type) -> T:
    """A `cls` of what it knows of an object: lists as tuples, those named in `nested` of its class."""
    values: dict[str, Any] = {}
    for name in {f.name for f in dataclasses.fields(cls)} & found.keys():  # type: ignore[arg-type]
        value = found[name]
        if name in nested:
            value = [_known(nested[name], one) for one in value]
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
