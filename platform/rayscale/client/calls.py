"""What can be asked of a server, and what its answers are: values, no I/O but reading a picture's file."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from rayscale import imaging
from rayscale.client.exchange import Spent
from rayscale.errors import ConfigError, IntegrityError
from rayscale.imaging import U8, Media
from rayscale.storage import os_errors, whole

T = TypeVar("T")

Image = bytes | str | Path | U8
"""Encoded bytes, a file's path, or pixels u8[h, w, 3] (a mask also u8[h, w], 255 = missing), which travel as PNG."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Who answered, and how long it took."""

    model: str  # "" where no model took part
    version: int | None
    digest: str  # SHA-256 of the artifact
    provider: str  # ONNX Runtime's execution provider
    tiling: str  # "whole", or "tiled" and the number of tiles
    request_id: str
    timing_ms: Mapping[str, float] = field(repr=False)  # the server's own: decode, queue, infer, encode
    elapsed_s: float  # here, attempts and waits included
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Picture(Answer):
    """An encoded picture."""

    data: bytes = field(repr=False)
    media_type: str

    @property
    def pixels(self) -> U8:
        """Decoded: u8[h, w, 3]. Raises: ImageError."""
        return imaging.decode_rgb(self.data, name="answer")

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all. Raises: MissingError, ResourceError."""
        with whole(Path(path)) as temporary:
            temporary.write_bytes(self.data)


@dataclass(frozen=True, kw_only=True)
class Embedding(Answer):
    """A picture as a vector: f32[dimensions]."""

    vector: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Similarity(Answer):
    """How alike two pictures are, by measure, as the server names them."""

    measures: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One version that the server knows of. Fields that a newer server adds are left out."""

    name: str
    version: int
    aliases: tuple[str, ...]
    digest: str
    ready: bool
    kind: str | None = None
    role: str | None = None  # the route that takes it
    family: str | None = None
    scale: int | None = None
    classes: tuple[str, ...] | None = None
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class Models:
    """What is served. `defaults` by route, where no model is named; `held` aliases are not followed yet, and why."""

    generation: int
    defaults: Mapping[str, str]
    models: tuple[ModelInfo, ...]
    held: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One request, and how its answer is read. `body` holds httpx's content=, json= or files=."""

    path: str
    read: Callable[[httpx.Response, Spent], T]
    method: str = "POST"
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


def upscale(image: Image, model: str, media: Media, options: Mapping[str, object]) -> Call[Picture]:
    body = {"content": encoded(image)}
    return Call(path="/v1/upscale", read=_picture, params=_params(model, options), headers=_accept(media), body=body)


def restore(image: Image, mask: Image | None, model: str, media: Media, options: Mapping[str, object]) -> Call[Picture]:
    body: dict[str, Any] = {"content": encoded(image)}
    if mask is not None:
        body = {"files": {"image": encoded(image), "mask": encoded(mask)}}
    return Call(path="/v1/restore", read=_picture, params=_params(model, options), headers=_accept(media), body=body)


def generate(
    model: str, seed: int, n: int, class_name: str | None, media: Media, options: Mapping[str, object]
) -> Call[tuple[Picture, ...]]:
    if n < 1:
        raise ConfigError("n", n, "must be at least 1", "ask for one picture or more")
    accept = _accept(media)
    if n > 1:
        accept, options = {"Accept": "application/json"}, {"output_format": media, **options}
    asked = {"model": model or None, "seed": seed, "n": n, "class": class_name, **options}
    body = {"json": {name: value for name, value in asked.items() if value is not None}}
    return Call(path="/v1/generate", read=_one if n == 1 else _several, headers=accept, body=body)


def embed(image: Image, model: str, options: Mapping[str, object]) -> Call[Embedding]:
    def read(response: httpx.Response, spent: Spent) -> Embedding:
        vector = np.asarray(_first(response).get("embedding", ()), np.float32)
        if vector.ndim != 1 or not vector.size:
            raise _strange(response, "holds no embedding")
        return Embedding(vector=vector, **_about(response, spent))

    params = _params(model, options)
    return Call(path="/v1/embed", read=read, params=params, body={"content": encoded(image)})


def similarity(a: Image, b: Image, model: str, options: Mapping[str, object]) -> Call[Similarity]:
    def read(response: httpx.Response, spent: Spent) -> Similarity:
        measures = {name: value for name, value in _first(response).items() if name != "index"}
        return Similarity(measures=measures, **_about(response, spent))

    files = {"a": encoded(a, "a"), "b": encoded(b, "b")}
    return Call(path="/v1/similarity", read=read, params=_params(model, options), body={"files": files})


def models() -> Call[Models]:
    def read(response: httpx.Response, _: Spent) -> Models:
        found = _object(response)
        try:
            return Models(
                generation=found["generation"],
                defaults=found["defaults"],
                models=tuple(_info(one) for one in found["models"]),
                held=found["held"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise _strange(response, f"is no list of models ({error})") from None

    return Call(path="/v1/models", read=read, method="GET")


def encoded(image: Image, name: str = "image") -> bytes:
    """The picture's file. Raises: MissingError for a path that cannot be read; ConfigError for other arrays."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        three = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
        if three.dtype != np.uint8 or three.ndim != 3 or three.shape[2] != 3 or not three.size:
            shown = f"{image.dtype}{list(image.shape)}"
            raise ConfigError(name, shown, "must be u8[h, w, 3], or u8[h, w]", "convert it to 8-bit RGB")
        return imaging.encode(np.ascontiguousarray(three), "png")
    with os_errors(Path(image)):
        return Path(image).read_bytes()


# --- reading answers


def _params(model: str, options: Mapping[str, object]) -> dict[str, Any]:
    given = {"model": model or None, **options}
    return {name: value for name, value in given.items() if value is not None}


def _accept(media: Media) -> dict[str, str]:
    if media not in ("png", "jpeg", "webp"):
        raise ConfigError("media", media, "must be png, jpeg or webp", "choose one of them")
    return {"Accept": f"image/{media}"}


def _picture(response: httpx.Response, spent: Spent) -> Picture:
    kind = response.headers.get("content-type", "")
    if not kind.startswith("image/"):
        raise _strange(response, "is no picture")
    return Picture(data=response.content, media_type=kind, **_about(response, spent))


def _one(response: httpx.Response, spent: Spent) -> tuple[Picture, ...]:
    return (_picture(response, spent),)


def _several(response: httpx.Response, spent: Spent) -> tuple[Picture, ...]:
    try:
        found = [base64.b64decode(one["b64_json"], validate=True) for one in _object(response)["data"]]
    except (KeyError, TypeError, binascii.Error) as error:
        raise _strange(response, f"holds no pictures ({error})") from None
    about = _about(response, spent)
    return tuple(Picture(data=data, media_type=_media_type(data), **about) for data in found)


def _media_type(data: bytes) -> str:
    return f"image/{imaging.read_header(data, name='answer').format}"


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _strange(response, "is no JSON object")
    return found


def _first(response: httpx.Response) -> dict[str, Any]:
    """Of the list that the answer is: what was asked about one picture or pair."""
    match _object(response).get("data"):
        case [dict(found), *_]:
            return found
    raise _strange(response, "is no list of results")


def _about(response: httpx.Response, spent: Spent) -> dict[str, Any]:
    model, _, version = response.headers.get("X-Rayscale-Model", "").rpartition(":")
    if not version.isdigit():
        model, version = response.headers.get("X-Rayscale-Model", ""), ""
    timing = re.findall(r"([\w-]+);dur=([\d.]+)", response.headers.get("Server-Timing", ""))
    return {
        "model": model,
        "version": int(version) if version else None,
        "digest": response.headers.get("X-Rayscale-Digest", ""),
        "provider": response.headers.get("X-Rayscale-Provider", ""),
        "tiling": response.headers.get("X-Rayscale-Tiling", ""),
        "request_id": response.headers.get("X-Request-Id", ""),
        "timing_ms": {name: float(value) for name, value in timing},
        "elapsed_s": spent.elapsed_s,
        "attempts": spent.attempts,
    }


def _info(found: Mapping[str, Any]) -> ModelInfo:
    """Lists as tuples; what is not known here is left out."""
    known: dict[str, Any] = {}
    for name in ModelInfo.__dataclass_fields__:
        if name in found:
            known[name] = tuple(found[name]) if isinstance(found[name], list) else found[name]
    return ModelInfo(**known)


def _strange(response: httpx.Response, rule: str) -> IntegrityError:
    shown = f"{response.headers.get('content-type', 'no type')}, {len(response.content)} bytes"
    return IntegrityError(f"answer of {response.request.url.path}", shown, rule, "is this a rayscale server?")
