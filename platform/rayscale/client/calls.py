"""What can be asked of a server: values, no I/O but reading a picture's file.

Parameters and defaults are the API's (`/docs` tells their ranges); what is at its default is not sent.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import numpy as np

from rayscale import imaging
from rayscale.client import answers
from rayscale.client.answers import Embedding, Generated, ModelDetail, Models, Picture, Read, Similarity
from rayscale.errors import ConfigError
from rayscale.imaging import U8, Media
from rayscale.latents import Z_MAX
from rayscale.storage import os_errors

T = TypeVar("T")

Image = bytes | str | Path | U8
"""Encoded bytes, a file's path, or pixels u8[h, w, 3] (a mask also u8[h, w], 255 = missing), which travel as PNG."""

Upscaling = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Restoring = Literal[
    "unchanged", "mean", "median", "gaussian", "bilateral", "nonlocal_means",
    "unsharp", "wiener_gaussian", "wiener_disc", "telea", "navier_stokes",
]  # fmt: skip
Merging = Literal["bicubic", "shift_and_add"]
Measure = Literal["mse", "psnr", "euclidean", "ssim", "ms_ssim", "sift", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One request, and how its answer is read. `body` holds httpx's content=, json= or files=."""

    path: str
    read: Read[T]
    method: str = "POST"
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


def upscale(
    image: Image,
    *,
    model: str = "",
    scale: int | None = None,
    method: Upscaling | None = None,
    contrast: float = 1.0,
    sharpen: float = 0.0,
    media: Media = "png",
) -> Call[Picture]:
    """A larger picture: by `model` (`name`, `name@alias`, `name:version`), or by a classical `method`."""
    params = _given(upscale, model=model, scale=scale, method=method, contrast=contrast, sharpen=sharpen)
    return _transform("upscale", {"content": encoded(image)}, params, media)


def restore(
    image: Image,
    mask: Image | None = None,
    *,
    model: str = "",
    method: Restoring | None = None,
    contrast: float = 1.0,
    sharpen: float = 0.0,
    media: Media = "png",
) -> Call[Picture]:
    """A picture of the same size, mended; `mask` (255 = missing) where it has holes."""
    body: dict[str, Any] = {"content": encoded(image)}
    if mask is not None:
        body = {"files": {"image": encoded(image), "mask": encoded(mask, "mask")}}
    params = _given(restore, model=model, method=method, contrast=contrast, sharpen=sharpen)
    return _transform("restore", body, params, media)


def burst(
    frames: Sequence[Image],
    *,
    model: str = "",
    scale: int | None = None,
    method: Merging | None = None,
    contrast: float = 1.0,
    sharpen: float = 0.0,
    media: Media = "png",
) -> Call[Picture]:
    """One larger picture of several shifted frames of a scene; the first is what the others are laid upon."""
    params = _given(burst, model=model, scale=scale, method=method, contrast=contrast, sharpen=sharpen)
    return _transform("burst", {"files": _parts("frames", frames)}, params, media)


def generate(
    *,
    model: str = "",
    seed: int | None = None,
    n: int = 1,
    first: int = 0,
    class_name: int | str | None = None,
    truncation: float = Z_MAX,
    to_seed: int | None = None,
    media: Media = "png",
) -> Call[tuple[Generated, ...]]:
    """`n` pictures of a seed from index `first` on, or on the way to `to_seed`; without one, the server draws it."""
    if n < 1:
        raise ConfigError("n", n, "must be at least 1", "ask for one picture or more")
    asked = _given(generate, model=model, seed=seed, n=n, first=first, truncation=truncation, to_seed=to_seed)
    if class_name is not None:
        asked["class"] = class_name
    accept = _accept(media)
    if n > 1:
        asked["output_format"], accept = media, {"Accept": "application/json"}
    read = answers.generated(n, first, seed)
    return Call(path="/v1/generate", read=read, headers=accept, body={"json": asked})


def embed(image: Image, *, model: str = "", side_px: int = 0) -> Call[Embedding]:
    """A picture as a vector; the model is shown it at `side_px` square, 0: at its own size."""
    params = _given(embed, model=model, side_px=side_px)
    read = answers.only(answers.embeddings(1))
    return Call(path="/v1/embed", read=read, params=params, body={"content": encoded(image)})


def embeddings(images: Sequence[Image], *, model: str = "", side_px: int = 0) -> Call[tuple[Embedding, ...]]:
    """Several pictures as vectors, in their order, of one request."""
    params = _given(embeddings, model=model, side_px=side_px)
    parts = _parts("images", images)
    return Call(path="/v1/embed", read=answers.embeddings(len(parts)), params=params, body={"files": parts})


def similarity(
    a: Image, b: Image, *, model: str = "", side_px: int = 0, measure: Sequence[Measure] = ()
) -> Call[Similarity]:
    """How alike two pictures are, by all measures that apply or by these; `model` and `side_px` are of the cosine."""
    params = _given(similarity, model=model, side_px=side_px, measure=measure)
    files = {"a": encoded(a, "a"), "b": encoded(b, "b")}
    read = answers.only(answers.similarities(1))
    return Call(path="/v1/similarity", read=read, params=params, body={"files": files})


def similarities(
    pairs: Sequence[tuple[Image, Image]], *, model: str = "", side_px: int = 0, measure: Sequence[Measure] = ()
) -> Call[tuple[Similarity, ...]]:
    """The same of several pairs, in their order, of one request."""
    _check_several("pairs", pairs)
    params = _given(similarities, model=model, side_px=side_px, measure=measure)
    rows = [{"a": _base64(a, "a"), "b": _base64(b, "b")} for a, b in pairs]
    body = {"content": json.dumps({"pairs": rows}).encode()}
    return Call(path="/v1/similarity", read=answers.similarities(len(rows)), params=params,
                headers={"Content-Type": "application/json"}, body=body)  # fmt: skip


def models() -> Call[Models]:
    """What is served."""
    return Call(path="/v1/models", read=answers.models, method="GET")


def model(name: str) -> Call[ModelDetail]:
    """One model, `name`, `name@alias` or `name:version`: its aliases, versions and cards."""
    if not name:
        raise ConfigError("name", "(none)", "must name a model", "`models` lists them")
    return Call(path=f"/v1/models/{quote(name, safe='@:')}", read=answers.model, method="GET")


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


def _transform(route: str, body: Mapping[str, Any], params: Mapping[str, Any], media: Media) -> Call[Picture]:
    return Call(path=f"/v1/{route}", read=answers.picture, params=params, headers=_accept(media), body=body)


def _given(build: Callable[..., Call[Any]], **asked: object) -> dict[str, Any]:
    """What differs from the keyword defaults of `build`."""
    defaults = build.__kwdefaults__ or {}
    return {name: value for name, value in asked.items() if value != defaults[name]}


def _accept(media: Media) -> dict[str, str]:
    if media not in ("png", "jpeg", "webp"):
        raise ConfigError("media", media, "must be png, jpeg or webp", "choose one of them")
    return {"Accept": f"image/{media}"}


def _parts(name: str, images: Sequence[Image]) -> list[tuple[str, bytes]]:
    _check_several(name, images)
    return [("image", encoded(image)) for image in images]


def _check_several(name: str, several: object) -> None:
    if isinstance(several, bytes | str | Path):
        raise ConfigError(name, type(several).__name__, "must be a list, this is one", "put it into a list")
    if not len(several):  # type: ignore[arg-type]  # an array has a length too
        raise ConfigError(name, "(none)", "must be at least one", "send one or more")


def _base64(image: Image, name: str) -> str:
    return base64.b64encode(encoded(image, name)).decode()
