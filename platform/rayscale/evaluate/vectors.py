"""How well an embedding finds the like of a picture: retrieval among the suite's photos."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from rayscale import distributions
from rayscale.contract import Scores
from rayscale.errors import ConfigError
from rayscale.evaluate.model import Model
from rayscale.evaluate.suite import Suite, pairs
from rayscale.features import BUILTINS
from rayscale.imaging import F32, U8, decode_rgb, encode, panel

METRICS = {"precision_at_10": "same class among the 10 nearest", "same_photo_at_1": "finds the photo of a copy"}
BASELINES = ("builtin:colour-histogram", "builtin:pixels")
NEAREST = 10
_BATCH = 32
_COPY_QUALITY, _COPY_SHARE = 40, 0.85  # a copy of a photo: its centre, mirrored, a bad JPEG

Embed = Callable[[U8], F32]
"""u8[n, h, w, 3] -> f32[n, d]."""


def score(model: Model, suite: Suite, subject: str, provider: str = "") -> Scores:
    """A row a photo. Without labels, or with too few photos of them, `precision_at_10` is left out."""
    return _score(embed_of(model), suite, subject, provider)


def score_baselines(suite: Suite) -> list[Scores]:
    """Of colour histograms and of raw pixels."""
    return [_score(BUILTINS[name], suite, name.partition(":")[2], "") for name in BASELINES]


def embed_of(model: Model) -> Embed:
    """The model's first output, of unit length."""
    entry, output = model.spec.inputs[0].name, model.spec.outputs[0].name

    def embed(pictures: U8) -> F32:
        nchw = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
        parts = [model.forward({entry: nchw[i : i + _BATCH]})[output] for i in range(0, len(nchw), _BATCH)]
        vectors = np.concatenate(parts)
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)

    return embed


def neighbours(model: Model, suite: Suite, max_images: int) -> U8:
    """A panel for people: a row a photo, then its nearest others."""
    pictures, labels, _ = _photos(suite)
    vectors = embed_of(model)(pictures)
    columns = min(6, len(pictures))
    cells = []
    for i in [k * len(pictures) // max_images for k in range(min(max_images, len(pictures)))]:
        order = np.argsort(((vectors - vectors[i]) ** 2).sum(axis=1), kind="stable")[:columns]
        cells += [(labels[j] or str(j), pictures[j]) for j in order]
    return panel(cells, columns=columns)


def _score(embed: Embed, suite: Suite, subject: str, provider: str) -> Scores:
    pictures, labels, keys = _photos(suite)
    gallery, queries = embed(pictures), embed(np.stack([_copy(p) for p in pictures]))
    values: dict[str, tuple[float, ...]] = {}
    if not np.isfinite(gallery).all() or not np.isfinite(queries).all():
        values = dict.fromkeys(METRICS, (float("nan"),) * len(keys))
    else:
        names, numbers = np.unique(labels, return_inverse=True)
        if len(names) > 1 and len(keys) > NEAREST:
            values["precision_at_10"] = tuple(distributions.precision_at_k(gallery, numbers, k=NEAREST).tolist())
        same = np.arange(len(keys))
        found = distributions.precision_at_k(queries, same, k=1, gallery=(gallery, same))
        values["same_photo_at_1"] = tuple(found.tolist())
    return Scores(subject=subject, suite=suite.digest, keys=keys, metrics=values, provider=provider)


def _photos(suite: Suite) -> tuple[U8, list[str], tuple[str, ...]]:
    given = list(pairs(suite))
    if len({pair.hr.shape for pair in given}) > 1:
        raise ConfigError("suite.side_px", suite.side_px, "photos are of several sizes", "set side_px and fit_px")
    return np.stack([p.hr for p in given]), [p.label for p in given], tuple(p.key for p in given)


def _copy(picture: U8) -> U8:
    height, width = picture.shape[:2]
    rows, columns = (round(side * (1 - _COPY_SHARE) / 2) for side in (height, width))
    inner = np.ascontiguousarray(picture[rows : height - rows or None, columns : width - columns or None][:, ::-1])
    resized = np.asarray(cv2.resize(inner, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    return decode_rgb(encode(resized, "jpeg", _COPY_QUALITY))
