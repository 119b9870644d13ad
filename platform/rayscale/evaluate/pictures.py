"""Quality of any image -> image function, picture by picture.

Everything that is compared (a classical method, a module in training, an artifact, a served endpoint) is a
`Run`, scored by the same code on the same pairs. Scores of another suite are never compared: its digest says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rayscale import classical, metrics
from rayscale.contract import Scores
from rayscale.data import degrade
from rayscale.data.extent import frames_of, mask_in
from rayscale.data.operators import Defocus, GaussianBlur, Jpeg, MotionBlur, Operator, Webp, walk
from rayscale.data.shards import open_split
from rayscale.errors import ConfigError, DivergedError
from rayscale.evaluate.model import Run
from rayscale.evaluate.suite import Pair, Suite, chosen, pairs
from rayscale.imaging import U8, panel
from rayscale.observe import log, progress

PSNR_CAP_DB = 100.0  # equal pictures have infinite PSNR, and a mean or a difference of infinities says nothing
METRICS = {"psnr_y": "PSNR Y (dB)", "ssim_y": "SSIM Y", "psnr_rgb": "PSNR RGB (dB)", "ssim_rgb": "SSIM RGB"}
RIVALS = 2  # classical methods that samples are shown beside


def score(run: Run, suite: Suite, subject: str, provider: str = "") -> Scores:
    """Score `run` picture by picture, as papers do: `scale` pixels of border cut (none at scale 1), uint8 first.

    PSNR is capped at 100 dB. A picture that is not finite scores NaN in every metric, so no gate passes it.

    Raises: ConfigError where `run` gives a picture of another size or type.
    """
    border_px = suite.scale if suite.scale > 1 else 0
    keys: list[str] = []
    rows: list[tuple[float, ...]] = []
    total = len(chosen(open_split(suite.photos_uri, suite.split), suite))
    with progress(f"score {subject[:12]}", total, "images") as shown:
        for pair in pairs(suite):
            keys.append(pair.key)
            rows.append(_score_one(run, pair, border_px))
            shown.update(len(keys), f"{rows[-1][0]:.2f} dB")
    values = dict(zip(METRICS, zip(*rows, strict=True), strict=True))
    return Scores(subject=subject, suite=suite.digest, keys=tuple(keys), metrics=values, provider=provider)


def sample_grid(
    suite: Suite, runs: Mapping[str, Run], max_images: int, crop_px: int, *, rivals: Mapping[str, Run] | None = None
) -> U8:
    """A panel for people: a row per picture, its most detailed crop as lr (nearest) | each run | the truth.

    `runs` see the crop alone: `crop_px` (high resolution) bounds the work, whatever the photos' size. Of `rivals` the
    RIVALS best on these very crops stand before them.
    """
    cells: list[tuple[str, U8]] = []
    limit = min(max_images, suite.max_images) if suite.max_images else max_images
    found = pairs(replace(suite, max_images=limit))
    crops = [pair if suite.side_px else _detail(pair, crop_px, suite.scale) for pair in found]
    runs = {**_best(rivals or {}, crops), **runs}
    for shown in crops:
        first, hr = shown.lr[0] if shown.lr.ndim == 4 else shown.lr, shown.hr
        caption = "low resolution" if suite.scale > 1 else "given"
        cells.append((caption, first.repeat(suite.scale, axis=0).repeat(suite.scale, axis=1)))
        for name, run in runs.items():
            try:
                sr = run(*shown.inputs)
                cells.append((f"{name} {_psnr(sr, hr, 0, luma_only=True):.2f} dB", sr))
            except DivergedError:
                cells.append((f"{name} not finite", np.zeros_like(hr)))
        cells.append(("truth", hr))
    return panel(cells, columns=len(runs) + 2)


def _best(runs: Mapping[str, Run], crops: Sequence[Pair]) -> dict[str, Run]:
    if len(runs) <= RIVALS:
        return dict(runs)
    gains = {
        name: sum(_psnr(run(*crop.inputs), crop.hr, 0, luma_only=True) for crop in crops) for name, run in runs.items()
    }
    return {name: runs[name] for name in sorted(runs, key=lambda name: -gains[name])[:RIVALS]}


def baseline(scale: int) -> Run:
    """The classical upscaler that every model must beat: MATLAB's bicubic."""

    def run(lr: U8) -> U8:
        return degrade.resize_bicubic(lr, lr.shape[0] * scale, lr.shape[1] * scale, border="replicate")

    return run


def baselines(suite: Suite) -> dict[str, Run]:
    """What a user would otherwise take, by name: classical methods with their usual settings."""
    problem = problem_of(suite.degradation)
    if problem == "upscale":
        return {"bicubic": baseline(suite.scale)}
    return {method.name: method.default() for method in classical.methods(problem, suite.scale)}


def problem_of(degradation: Sequence[Operator]) -> classical.Problem:
    """What a model of this degradation is for: the last of it that has a name in the field."""
    if frames_of(degradation):
        return "burst"
    if mask_in(degradation):
        return "inpaint"
    if degrade.scale_of(degradation) > 1:
        return "upscale"
    operators = list(walk(degradation))
    if any(isinstance(operator, GaussianBlur | MotionBlur | Defocus) for operator in operators):
        return "deblur"
    return "deblock" if any(isinstance(operator, Jpeg | Webp) for operator in operators) else "denoise"


def self_ensemble(run: Run) -> Run:
    """The mean of the 8 mirrored and turned answers, turned back (EDSR, arXiv:1707.02921): 8 times the work."""

    def ensemble(*inputs: U8) -> U8:
        total: Any = 0.0
        for turns in range(4):
            for mirrored in (False, True):
                views = [p[..., ::-1, :] if mirrored else p for p in inputs]
                views = [np.ascontiguousarray(np.rot90(v, turns, axes=(-3, -2))) for v in views]
                back = np.rot90(run(*views), -turns).astype(np.float32)
                total = total + (back[:, ::-1] if mirrored else back)
        return np.asarray(np.rint(total / 8), np.uint8)

    return ensemble


def _score_one(run: Run, pair: Pair, border_px: int) -> tuple[float, ...]:
    """The values of METRICS, in their order."""
    try:
        sr = run(*pair.inputs)
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


def _detail(pair: Pair, crop_px: int, scale: int) -> Pair:
    """The crop with the strongest edges, searched in half-overlapping windows: there models differ.

    Where pixels are missing, those that are: a crop without a hole shows nothing.
    """
    luma = metrics.luma(pair.hr if pair.mask is not None else pair.lr[0] if pair.lr.ndim == 4 else pair.lr)
    edges = np.abs(np.diff(luma, axis=0))[:, :-1] + np.abs(np.diff(luma, axis=1))[:-1]
    if pair.mask is not None:
        edges = edges * (pair.mask[:-1, :-1, 0] > 0)
    height, width = (min(max(crop_px // scale, 1), side) for side in luma.shape)
    windows = [
        (edges[y : y + height, x : x + width].sum(), -y, -x)
        for y in range(0, luma.shape[0] - height + 1, max(height // 2, 1))
        for x in range(0, luma.shape[1] - width + 1, max(width // 2, 1))
    ]
    _, y, x = max(windows)
    y, x = -y, -x
    rows, columns = slice(y, y + height), slice(x, x + width)
    hr = pair.hr[y * scale : (y + height) * scale, x * scale : (x + width) * scale]
    mask = None if pair.mask is None else pair.mask[rows, columns]
    return pair._replace(lr=pair.lr[..., rows, columns, :], hr=hr, mask=mask)
