"""How alike two sets of pictures are, and how well vectors find their like: functions of given features.

Features are f32 or f64[n, d], one row a picture, of one named feature net (`rayscale.features`); all is computed in
float64. A figure means nothing without the net, the number of samples and the resize that made its inputs: keep
them with it. Frechet distances of unlike sample counts are not compared, they are biased upward by 1/n.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayscale.errors import ConfigError
from rayscale.imaging import U8
from rayscale.metrics import F64, euclidean

Features = NDArray[np.floating[Any]]

_ROWS = 1024  # of a matrix of distances at once: bounds memory, changes no value


class Gaussian(NamedTuple):
    """Mean f64[d] and covariance f64[d, d]."""

    mean: F64
    covariance: F64


class Spread(NamedTuple):
    """A mean and the standard deviation around it, over subsets or splits."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """precision: share of generated samples that could be real; recall: share of real ones that are covered."""

    precision: float
    recall: float


def fit_gaussian(features: Features) -> Gaussian:
    """Mean and unbiased covariance (divided by n - 1). Raises: ConfigError for fewer than two rows, or NaN."""
    x = _checked(features, "features", least=2)
    centred = x - (mean := x.mean(axis=0))
    return Gaussian(mean, centred.T @ centred / (len(x) - 1))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).

    Of Inception's pool features it is known as FID (Heusel et al. 2017, arXiv 1706.08500; Dowson, Landau 1982).
    The trace of the root is the sum of singular values of S1^1/2 S2^1/2: no root of an unsymmetric matrix, which
    loses half the digits where a covariance is singular.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError("features", f"{a.mean.shape} and {b.mean.shape}", "must be alike", "use one feature net")
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    apart = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(apart), 0.0)


def mmd2(a: Features, b: Features) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3; around 0, also below, for equals.

    Source: Gretton et al. 2012, eq. 3; kernel of Binkowski et al. 2018 (arXiv 1801.01401). Raises: ConfigError.
    """
    x, y = _checked(a, "first", least=2), _checked(b, "second", least=2)
    _check_alike(x, y)
    n, m = len(x), len(y)
    of_x, of_y = _kernel(x, x), _kernel(y, y)
    within = (of_x.sum() - np.trace(of_x)) / (n * (n - 1)) + (of_y.sum() - np.trace(of_y)) / (m * (m - 1))
    return float(within - 2 * _kernel(x, y).mean())


def kid(a: Features, b: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Spread:
    """Kernel Inception distance: mean and deviation of `mmd2` over random subsets, each drawn without replacement.

    Source: Binkowski et al. 2018 (arXiv 1801.01401). Raises: ConfigError where a subset is larger than a set.
    """
    least = min(len(a), len(b))
    if not 2 <= subset_size <= least:
        raise ConfigError("subset_size", subset_size, f"must be in [2, {least}], the smaller set", "lower it")
    if subsets < 1:
        raise ConfigError("subsets", subsets, "must be at least 1", "100 is usual")
    x, y = _checked(a, "first", least=2), _checked(b, "second", least=2)
    draw = np.random.Generator(np.random.Philox(seed))
    values = [
        mmd2(*(s[draw.choice(len(s), subset_size, replace=False)] for s in (x, y)))  # each by itself: they may overlap
        for _ in range(subsets)
    ]
    return Spread(float(np.mean(values)), float(np.std(values)))


def class_score(probabilities: Features, *, splits: int = 10) -> Spread:
    """Inception score over any classifier: exp of the mean KL(p(class | picture) | p(class)), in [1, classes].

    probabilities: [n, classes], rows sum to 1. The set is cut in its order into `splits` parts, as its authors do.
    Source: Salimans et al. 2016 (arXiv 1606.03498). Raises: ConfigError for rows that are no probabilities.
    """
    p = _checked(probabilities, "probabilities", least=max(splits, 1))
    if splits < 1:
        raise ConfigError("splits", splits, "must be at least 1", "10 is usual")
    if (p < 0).any() or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ConfigError("probabilities", f"sums from {p.sum(1).min():.3g} to {p.sum(1).max():.3g}",
                          "rows must be probabilities that sum to 1", "apply softmax first")  # fmt: skip
    scores = []
    for part in np.array_split(p, splits):
        marginal = part.mean(axis=0)
        ratio = np.divide(part, marginal, out=np.ones_like(part), where=part > 0)  # 0 log 0 is 0
        scores.append(np.exp((part * np.log(ratio)).sum(axis=1).mean()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(real: Features, generated: Features, *, k: int = 3) -> PrecisionRecall:
    """Shares of each set inside the other's manifold: the union of balls that reach to the k-th nearest neighbour.

    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991); k = 3 and equally many samples are theirs.
    Raises: ConfigError for a k that a set has no neighbours for.
    """
    x, y = _checked(real, "real", least=k + 1), _checked(generated, "generated", least=k + 1)
    _check_alike(x, y)
    if k < 1:
        raise ConfigError("k", k, "must be at least 1", "3 is usual")
    return PrecisionRecall(precision=_inside(y, x, k), recall=_inside(x, y, k))


def precision_at_k(
    features: Features, labels: NDArray[np.integer[Any]], *, k: int = 10, gallery: tuple[Any, Any] | None = None
) -> F64:
    """Of each picture's k nearest, the share with its label: f64[n]. Euclidean, so for unit vectors cosine too.

    labels: int[n]. gallery: (features [m, d], labels [m]) to search in; by default the others of the set itself.
    Of equally near ones the first counts. Raises: ConfigError for fewer than k others.
    """
    own = gallery is None
    found, found_labels = (features, labels) if gallery is None else gallery
    x, y = _checked(features, "features", least=1), _checked(found, "gallery", least=k + own)
    _check_alike(x, y)
    if k < 1:
        raise ConfigError("k", k, "must be at least 1", "10 is usual")
    if (len(labels), len(found_labels)) != (len(x), len(y)):
        rule = f"must be one a row, {len(x)} and {len(y)} in the gallery"
        raise ConfigError("labels", f"{len(labels)} and {len(found_labels)}", rule, "pass them all")
    shares = np.empty(len(x))
    for start, distances in _distances(x, y, own):
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
        rows = slice(start, start + len(distances))
        shares[rows] = (np.asarray(found_labels)[nearest] == np.asarray(labels)[rows, None]).mean(axis=1)
    return shares


def gaussian_pixels(pictures: U8, count: int, *, seed: int = 0) -> U8:
    """u8[count, h, w, 3] drawn from the Gaussian with the pictures' mean and covariance: what a generator must beat.

    Every sample is the mean plus the pictures' deviations in random proportions g / sqrt(n - 1), g ~ N(0, 1): that
    has exactly the sample covariance of all h * w * 3 values, which itself would be too large to write down.
    """
    if pictures.ndim != 4 or len(pictures) < 2:
        raise ConfigError("pictures", pictures.shape, "must be [n, h, w, 3] with n of 2 or more", "give more pictures")
    x = pictures.reshape(len(pictures), -1).astype(np.float32)
    x -= (mean := x.mean(axis=0, dtype=np.float64).astype(np.float32))
    draw = np.random.Generator(np.random.Philox(seed))
    weights = draw.standard_normal((count, len(x)), np.float32) / np.float32(np.sqrt(len(x) - 1))
    samples = np.empty((count, x.shape[1]), np.uint8)
    for start in range(0, count, _ROWS):
        values = weights[start : start + _ROWS] @ x + mean
        samples[start : start + _ROWS] = np.clip(np.rint(values), 0, 255)
    return samples.reshape(count, *pictures.shape[1:])


def _checked(features: Features, field: str, least: int) -> F64:
    if features.ndim != 2 or len(features) < least:
        raise ConfigError(field, features.shape, f"must be [n, d] with n of {least} or more", "give more pictures")
    x = features.astype(np.float64)
    if not np.isfinite(x).all():
        raise ConfigError(field, f"{int((~np.isfinite(x)).sum())} values", "must be finite", "look at the feature net")
    return x


def _check_alike(x: F64, y: F64) -> None:
    if x.shape[1] != y.shape[1]:
        raise ConfigError("features", f"{x.shape} and {y.shape}", "must be equally wide", "use one feature net")


def _root(covariance: F64) -> F64:
    """Symmetric root of a positive semidefinite matrix; eigenvalues that rounding took below 0 count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def _kernel(x: F64, y: F64) -> F64:
    return np.asarray((x @ y.T / x.shape[1] + 1.0) ** 3)


def _distances(x: F64, y: F64, own: bool) -> Iterator[tuple[int, F64]]:
    """(first row, f64[rows, m]) in blocks; with `own`, y is x and nobody is his own neighbour."""
    for start in range(0, len(x), _ROWS):
        block = euclidean(x[start : start + _ROWS], y)
        if own:
            rows = np.arange(len(block))
            block[rows, start + rows] = np.inf
        yield start, block


def _inside(points: F64, of: F64, k: int) -> float:
    """Share of `points` in the union of balls around `of`."""
    radii = np.concatenate([np.partition(block, k - 1, axis=1)[:, k - 1] for _, block in _distances(of, of, True)])
    return float(np.mean(np.concatenate([(block <= radii).any(axis=1) for _, block in _distances(points, of, False)])))
