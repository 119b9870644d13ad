"""Distances of sets: closed forms, SciPy, the authors' formulas written out, and what must not move them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from rayscale import distributions
from rayscale.distributions import (
    Gaussian,
    class_score,
    fit_gaussian,
    frechet,
    gaussian_pixels,
    kid,
    mmd2,
    precision_at_k,
    precision_recall,
)
from rayscale.errors import ConfigError
from rayscale.metrics import F64


def normal(n: int, d: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> F64:
    """Correlated: white noise through a fixed matrix."""
    mix = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d) + np.eye(d)
    return np.random.default_rng(seed).normal(size=(n, d)) @ mix * scale + mean


def scipys_frechet(a: Gaussian, b: Gaussian) -> float:
    """As pytorch-fid writes it."""
    root = sqrtm(a.covariance @ b.covariance).real
    return float(np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root))


def test_frechet_equals_the_root_of_scipy() -> None:
    a, b = fit_gaussian(normal(300, 20, 0)), fit_gaussian(normal(200, 20, 1, mean=0.3, scale=1.4))
    assert frechet(a, b) == pytest.approx(scipys_frechet(a, b), rel=1e-10)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-12)
    np.testing.assert_allclose(a.covariance, np.cov(normal(300, 20, 0), rowvar=False), rtol=1e-12, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0, 3)] * 2), min_size=1, max_size=8))
def test_frechet_of_independent_axes_is_a_sum(axes: list[tuple[float, float, float, float]]) -> None:
    """Closed form: (m1 - m2)^2 + (s1 - s2)^2 an axis; a rotation of the space changes nothing."""
    m1, m2, s1, s2 = (np.array(v) for v in zip(*axes, strict=True))
    expected = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(len(m1),) * 2))[0]
    a, b = (Gaussian(turn @ m, turn @ np.diag(s**2) @ turn.T) for m, s in ((m1, s1), (m2, s2)))
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_frechet_of_a_set_with_itself_is_nought_even_where_its_covariance_is_singular() -> None:
    few = fit_gaussian(normal(30, 100, 3, scale=20.0))
    assert frechet(few, few) < 1e-8 * np.trace(few.covariance)
    moved = Gaussian(few.mean + 0.01, few.covariance)
    assert frechet(few, moved) == pytest.approx(100 * 0.01**2, rel=1e-3)


def test_kid_is_the_unbiased_estimate_of_its_authors() -> None:
    """mmd2 by scikit-learn's kernel and sums over unequal pairs, one by one."""
    x, y = normal(25, 7, 0), normal(31, 7, 1, mean=0.4)
    kernels = [polynomial_kernel(p, q, degree=3, gamma=1 / 7, coef0=1) for p, q in ((x, x), (y, y), (x, y))]
    xx, yy = (
        sum(k[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        for k, n in zip(kernels, (25, 31), strict=False)
    )
    assert mmd2(x, y) == pytest.approx(xx + yy - 2 * kernels[2].mean(), rel=1e-10)
    whole = kid(x, y[:25], subsets=3, subset_size=25)  # a subset of all, in another order
    assert whole == pytest.approx((mmd2(x, y[:25]), 0), rel=1e-10, abs=1e-12)


def test_kid_of_equals_lies_around_nought_and_of_others_above() -> None:
    values = np.array([mmd2(normal(60, 8, 2 * s), normal(60, 8, 2 * s + 1)) for s in range(200)])
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error
    assert (values < 0).any()  # unbiased: it cannot be clipped
    biased = values + 0.0
    for s in range(200):  # negative control: with the diagonal it is of another mean
        x, y = normal(60, 8, 2 * s), normal(60, 8, 2 * s + 1)
        k = [polynomial_kernel(p, q, degree=3, gamma=1 / 8, coef0=1).mean() for p, q in ((x, x), (y, y), (x, y))]
        biased[s] = k[0] + k[1] - 2 * k[2]
    assert biased.mean() > 10 * error
    found = kid(normal(300, 8, 0), normal(300, 8, 1, mean=0.5), subsets=20, subset_size=100)
    assert found.mean > 5 * kid(normal(300, 8, 0), normal(300, 8, 1), subsets=20, subset_size=100).std
    assert found == kid(normal(300, 8, 0), normal(300, 8, 1, mean=0.5), subsets=20, subset_size=100)  # its own seed


def test_class_score_equals_the_entropies_of_scipy() -> None:
    p = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 95)
    parts = np.array_split(p, 10)
    expected = [np.exp(np.mean([entropy(row, part.mean(0)) for row in part])) for part in parts]
    found = class_score(p)
    assert found == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-10)
    # closed forms: sure and even over the classes is the number of classes; all alike is 1
    assert class_score(np.eye(6), splits=1).mean == pytest.approx(6)
    assert class_score(np.full((12, 6), 1 / 6), splits=1).mean == pytest.approx(1)
    with pytest.raises(ConfigError, match="apply softmax first"):
        class_score(np.random.default_rng(0).normal(size=(20, 6)))


def nvidias_precision_recall(real: F64, fake: F64, k: int) -> tuple[float, float]:
    """By scikit-learn's neighbours, the point itself counted as the first."""
    radii = [NearestNeighbors(n_neighbors=k + 1).fit(s).kneighbors(s)[0][:, k] for s in (real, fake)]
    distances = cdist(real, fake)
    return (
        float((distances <= radii[0][:, None]).any(axis=0).mean()),
        float((distances <= radii[1][None]).any(axis=1).mean()),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_those_by_scikit_learn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(120, 3, 0), normal(90, 3, 1, mean=0.8, scale=0.7)
    expected = nvidias_precision_recall(real, fake, k)
    assert precision_recall(real, fake, k=k) == expected
    monkeypatch.setattr(distributions, "_ROWS", 7)  # blocks are a matter of memory only
    assert precision_recall(real, fake, k=k) == expected


def test_precision_and_recall_tell_quality_from_variety() -> None:
    real = normal(200, 4, 0)
    same = precision_recall(real, real)
    assert same == (1.0, 1.0)
    far = precision_recall(real, real + 1000)
    assert far == (0.0, 0.0)
    narrow = precision_recall(real, normal(200, 4, 1, scale=0.2))
    wide = precision_recall(real, normal(200, 4, 1, scale=5.0))
    assert narrow.precision > 0.9 > 0.3 > narrow.recall
    assert wide.recall > 0.5 > 0.3 > wide.precision


def test_precision_at_k_equals_scikit_learns_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 80)
    x = rng.normal(size=(80, 5)) + labels[:, None]
    order = NearestNeighbors(n_neighbors=11).fit(x).kneighbors(x)[1]
    assert (order[:, 0] == np.arange(80)).all()
    expected = (labels[order[:, 1:]] == labels[:, None]).mean(1)
    np.testing.assert_array_equal(precision_at_k(x, labels), expected)
    monkeypatch.setattr(distributions, "_ROWS", 7)
    np.testing.assert_array_equal(precision_at_k(x, labels), expected)
    gallery = NearestNeighbors(n_neighbors=3).fit(x[50:]).kneighbors(x[:50])[1]
    expected = (labels[50:][gallery] == labels[:50, None]).mean(1)
    np.testing.assert_array_equal(precision_at_k(x[:50], labels[:50], k=3, gallery=(x[50:], labels[50:])), expected)


def test_precision_at_k_of_noise_is_chance_and_of_classes_apart_is_one() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(5), 100)
    noise = rng.normal(size=(500, 8))
    assert precision_at_k(noise, labels).mean() == pytest.approx(0.2, abs=0.02)
    assert precision_at_k(noise + 100 * labels[:, None], labels).mean() == 1.0


def test_pixels_of_a_gaussian_have_the_pictures_moments() -> None:
    rng = np.random.default_rng(0)
    base = np.linspace(60, 190, 4 * 5 * 3).reshape(4, 5, 3)
    x = np.clip(np.rint(base + rng.normal(0, 20, (50, 1, 1, 3)) + rng.normal(0, 5, (50, 4, 5, 3))), 0, 255)
    pictures = x.astype(np.uint8)
    drawn = gaussian_pixels(pictures, 20_000)
    assert drawn.shape == (20_000, 4, 5, 3)
    real, fake = (fit_gaussian(p.reshape(len(p), -1)) for p in (pictures, drawn))
    np.testing.assert_allclose(fake.mean, real.mean, atol=0.8)
    assert np.abs(fake.covariance - real.covariance).max() < 0.05 * np.abs(real.covariance).max()
    assert frechet(real, fake) < 0.01 * np.trace(real.covariance)
    # negative control: independent pixels of the same means and deviations are told from it
    flat = rng.normal(real.mean, np.sqrt(np.diag(real.covariance)), (20_000, 60))
    assert frechet(real, fit_gaussian(flat)) > 0.2 * np.trace(real.covariance)
    np.testing.assert_array_equal(gaussian_pixels(pictures, 9, seed=4), gaussian_pixels(pictures, 9, seed=4))
    assert (gaussian_pixels(pictures, 9, seed=4) != gaussian_pixels(pictures, 9, seed=5)).any()


def test_mistakes_are_named() -> None:
    x = normal(20, 3, 0)
    bad = x.copy()
    bad[3, 1] = np.nan
    for wrong, match in (
        (lambda: fit_gaussian(bad), r"features=1 values: must be finite"),
        (lambda: fit_gaussian(x[:1]), r"features=\(1, 3\): must be \[n, d\] with n of 2 or more"),
        (lambda: frechet(fit_gaussian(x), fit_gaussian(x[:, :2])), "use one feature net"),
        (lambda: mmd2(x, x[:, :2]), "must be equally wide"),
        (lambda: kid(x, x), r"subset_size=1000: must be in \[2, 20\]"),
        (lambda: kid(x, x, subset_size=5, subsets=0), "subsets=0"),
        (lambda: class_score(x[:5]), "probabilities="),
        (lambda: precision_recall(x, x[:3]), r"generated=\(3, 3\)"),
        (lambda: precision_recall(x, x, k=0), "k=0"),
        (lambda: precision_at_k(x[:10], np.zeros(10, int)), r"gallery=\(10, 3\)"),
        (lambda: precision_at_k(x, np.zeros(19, int)), "labels=19 and 19: must be one a row, 20 and 20"),
        (lambda: gaussian_pixels(np.zeros((1, 4, 4, 3), np.uint8), 3), "pictures="),
    ):
        with pytest.raises(ConfigError, match=match):
            wrong()
