"""Quality of any image -> image function on a suite of held-out pictures.

Everything that is compared (a classical baseline, a module in training, an artifact, a served endpoint) is a
`Run`, scored by the same code on the same pairs. Scores of another suite are never compared: its digest says so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayscale import contract, metrics
from rayscale.contract import Scores, Spec
from rayscale.data import degrade
from rayscale.data.operators import Burst, Mask, Operator, walk
from rayscale.data.shards import Photos, open_split
from rayscale.errors import ConfigError, DivergedError, MissingError
from rayscale.imaging import F32, U8, decode_rgb, panel, run_tiled, to_hwc_u8, to_nchw_f32
from rayscale.observe import log, progress

if TYPE_CHECKING:  # scoring an artifact needs no torch, and training no ONNX Runtime
    import torch
    from torch import nn

    from rayscale.artifact import Session

Run = Callable[[U8], U8]
"""lr u8[h, w, 3] -> sr u8[h * scale, w * scale, 3]. Raises DivergedError where its picture is not finite."""

PSNR_CAP_DB = 100.0  # equal pictures have infinite PSNR, and a mean or a difference of infinities says nothing
METRICS = {"psnr_y": "PSNR Y (dB)", "ssim_y": "SSIM Y", "psnr_rgb": "PSNR RGB (dB)", "ssim_rgb": "SSIM RGB"}

_READ_AT_ONCE = 8  # photos in memory; range reads of neighbours are coalesced


class Pair(NamedTuple):
    """One picture of a suite: lr u8[h, w, 3], hr u8[h * scale, w * scale, 3]."""

    key: str
    lr: U8
    hr: U8


@dataclass(frozen=True)
class Suite:
    """Which pictures, degraded how. A limit of 0 is none.

    max_images takes evenly spaced ones, so that a split sorted by class keeps its classes; max_side_px cuts the
    centre out of larger photos (shrinking them would make them sharper than photos are).
    """

    photos_uri: str  # of a dataset, as data/shards.py packs it
    split: str
    degradation: tuple[Operator, ...]
    max_images: int = 0
    max_side_px: int = 0  # high resolution

    def __post_init__(self) -> None:
        for operator in walk(self.degradation):
            if isinstance(operator, Mask | Burst):
                rule = "a suite is of pictures alone: it has no masks and no bursts"
                raise ConfigError("suite.degradation", operator.name, rule, "score with a degradation without it")
        if self.max_images < 0:
            raise ConfigError("suite.max_images", self.max_images, "must not be negative", "0 takes all")
        if self.max_side_px < 0 or 0 < self.max_side_px < self.scale:
            raise ConfigError(
                "suite.max_side_px", self.max_side_px, f"must be at least the scale, {self.scale}", "0 is no limit"
            )

    @property
    def scale(self) -> int:
        """High-resolution side / low-resolution side."""
        return degrade.scale_of(self.degradation)

    @cached_property
    def digest(self) -> str:
        """What makes two suites the same: content, not place."""
        photos = open_split(self.photos_uri, self.split)
        limits = {"max_images": self.max_images, "max_side_px": self.max_side_px}
        return contract.digest(
            {"photos": photos.digest, "split": self.split, "degradation": self.degradation, "limits": limits}
        )


def pairs(suite: Suite) -> Iterator[Pair]:
    """The suite's pictures in the order of its split, hr cut to multiples of the scale (right and bottom edge).

    Raises: MissingError for a split without photos; as `open_split` and `decode_rgb`.
    """
    photos = open_split(suite.photos_uri, suite.split)
    chosen = _chosen(photos, suite)
    for start in range(0, len(chosen), _READ_AT_ONCE):
        indices = chosen[start : start + _READ_AT_ONCE]
        for index, data in zip(indices, photos.read(indices), strict=True):
            key = str(photos.keys[index])
            hr = _cut(decode_rgb(data, name=key), suite)
            lr, _ = degrade.apply(suite.degradation, hr, _generator(key))
            yield Pair(key, lr, hr)


def score(run: Run, suite: Suite, subject: str, provider: str = "") -> Scores:
    """Score `run` picture by picture, as papers do: `scale` pixels of border cut (none at scale 1), uint8 first.

    PSNR is capped at 100 dB. A picture that is not finite scores NaN in every metric, so no gate passes it.

    Raises: ConfigError where `run` gives a picture of another size or type.
    """
    border_px = suite.scale if suite.scale > 1 else 0
    keys: list[str] = []
    rows: list[tuple[float, ...]] = []
    total = len(_chosen(open_split(suite.photos_uri, suite.split), suite))
    with progress(f"score {subject[:12]}", total, "images") as shown:
        for pair in pairs(suite):
            keys.append(pair.key)
            rows.append(_score_one(run, pair, border_px))
            shown.update(len(keys), f"{rows[-1][0]:.2f} dB")
    values = dict(zip(METRICS, zip(*rows, strict=True), strict=True))
    return Scores(subject=subject, suite=suite.digest, keys=tuple(keys), metrics=values, provider=provider)


def compare(scores: Mapping[str, Scores]) -> str:
    """Means as a markdown table, one row per name; in brackets the gain over the first row.

    Raises: ConfigError where the scores are of different suites or pictures.
    """
    first = next(iter(scores.values()))
    lines = [f"| {len(first.keys)} images | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 1) + "|"]
    for name, one in scores.items():
        if (one.suite, one.keys) != (first.suite, first.keys):
            raise ConfigError(f"suite of {name}", one.suite, f"must be {first.suite}", "score both on one suite")
        cells = []
        for metric in METRICS:
            digits = 2 if metric.startswith("psnr") else 4
            gain = "" if one is first else f" ({one.mean(metric) - first.mean(metric):+.{digits}f})"
            cells.append(f"{one.mean(metric):.{digits}f}{gain}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sample_grid(suite: Suite, runs: Mapping[str, Run], max_images: int, crop_px: int) -> U8:
    """A panel for people: a row per picture, its most detailed crop as lr (nearest) | each run | the truth.

    `runs` see the crop alone: `crop_px` (high resolution) bounds the work, whatever the photos' size.
    """
    cells: list[tuple[str, U8]] = []
    limit = min(max_images, suite.max_images) if suite.max_images else max_images
    for pair in pairs(replace(suite, max_images=limit)):
        lr, hr = _detail(pair, crop_px, suite.scale)
        cells.append(("low resolution", lr.repeat(suite.scale, axis=0).repeat(suite.scale, axis=1)))
        for name, run in runs.items():
            try:
                sr = run(lr)
                cells.append((f"{name} {_psnr(sr, hr, 0, luma_only=True):.2f} dB", sr))
            except DivergedError:
                cells.append((f"{name} not finite", np.zeros_like(hr)))
        cells.append(("truth", hr))
    return panel(cells, columns=len(runs) + 2)


def baseline(scale: int) -> Run:
    """The classical upscaler that every model must beat: MATLAB's bicubic."""

    def run(lr: U8) -> U8:
        return degrade.resize_bicubic(lr, lr.shape[0] * scale, lr.shape[1] * scale, border="replicate")

    return run


def session_run(session: Session, tile_px: int | None = None) -> Run:
    """An artifact as a `Run`: the very path of serving. Without `tile_px` (or a halo) pictures run whole."""
    return _float_run(session.transform, session.card.spec, tile_px)


def torch_run(module: nn.Module, device: torch.device, spec: Spec | None = None) -> Run:
    """A module as a `Run`, for validation while it trains: float32, no autocast, whole pictures.

    `spec` is needed where sides must be aligned. Each submodule's mode is put back after each picture.
    """
    import torch

    def forward(nchw: F32) -> F32:
        modes = [(m, m.training) for m in module.modules()]  # mixed: an averaged copy is always in eval mode
        module.eval()
        try:
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                found: F32 = module(torch.from_numpy(nchw).to(device)).float().cpu().numpy()
                return found
        finally:
            for submodule, mode in modes:
                submodule.training = mode

    if spec is None:
        return lambda lr: _finite_u8(forward(to_nchw_f32(lr)))
    return _float_run(forward, spec, None)


def _float_run(forward: Callable[[F32], F32], spec: Spec, tile_px: int | None) -> Run:
    def run(lr: U8) -> U8:
        sr = run_tiled(
            forward, to_nchw_f32(lr), scale=spec.scale, tile_px=tile_px, halo_px=spec.halo_px, align=spec.align
        )
        return _finite_u8(sr)

    return run


def _finite_u8(nchw: F32) -> U8:
    """Raises: DivergedError for NaN and infinities, which as uint8 would look like a picture."""
    if not np.isfinite(nchw).all():
        bad = int(nchw.size - np.isfinite(nchw).sum())
        raise DivergedError("picture", f"{bad} of {nchw.size} values are NaN or infinite", "must be finite",
                            "the weights are broken: go back to an earlier checkpoint")  # fmt: skip
    return to_hwc_u8(nchw)


def _score_one(run: Run, pair: Pair, border_px: int) -> tuple[float, ...]:
    """The values of METRICS, in their order."""
    try:
        sr = run(pair.lr)
    except DivergedError as error:
        log.warning("%s: %s", pair.key, error)
        return (math.nan,) * len(METRICS)
    if sr.dtype != np.uint8 or sr.shape != pair.hr.shape:
        rule = f"must be uint8 {pair.hr.shape} for {pair.key}"
        raise ConfigError("run's picture", f"{sr.dtype} {sr.shape}", rule, "score a model of the suite's scale")
    return (
        _psnr(sr, pair.hr, border_px, luma_only=True),
        metrics.ssim(sr, pair.hr, border_px=border_px, luma_only=True),
        _psnr(sr, pair.hr, border_px, luma_only=False),
        metrics.ssim(sr, pair.hr, border_px=border_px, luma_only=False),
    )


def _psnr(a: U8, b: U8, border_px: int, *, luma_only: bool) -> float:
    return min(metrics.psnr(a, b, border_px=border_px, luma_only=luma_only), PSNR_CAP_DB)


def _chosen(photos: Photos, suite: Suite) -> list[int]:
    count = len(photos)
    if count == 0:
        raise MissingError("suite.split", suite.split, f"{suite.photos_uri} has no photos in it", "pack more photos")
    taken = min(suite.max_images or count, count)
    return [i * count // taken for i in range(taken)]


def _cut(hr: U8, suite: Suite) -> U8:
    height, width = (min(side, suite.max_side_px or side) for side in hr.shape[:2])
    top, left = (hr.shape[0] - height) // 2, (hr.shape[1] - width) // 2
    height, width = height // suite.scale * suite.scale, width // suite.scale * suite.scale
    return hr[top : top + height, left : left + width]


def _generator(key: str) -> np.random.Generator:
    """A picture is degraded alike whatever else is in the suite, on every machine, in every run."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16])))


def _detail(pair: Pair, crop_px: int, scale: int) -> tuple[U8, U8]:
    """The crop with the strongest edges, searched in half-overlapping windows: there upscalers differ."""
    luma = metrics.luma(pair.lr)
    edges = np.abs(np.diff(luma, axis=0))[:, :-1] + np.abs(np.diff(luma, axis=1))[:-1]
    height, width = (min(max(crop_px // scale, 1), side) for side in luma.shape)
    windows = [
        (edges[y : y + height, x : x + width].sum(), -y, -x)
        for y in range(0, luma.shape[0] - height + 1, max(height // 2, 1))
        for x in range(0, luma.shape[1] - width + 1, max(width // 2, 1))
    ]
    _, y, x = max(windows)
    y, x = -y, -x
    hr = pair.hr[y * scale : (y + height) * scale, x * scale : (x + width) * scale]
    return pair.lr[y : y + height, x : x + width], hr
