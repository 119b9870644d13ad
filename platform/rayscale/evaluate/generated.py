"""How like photos a generator's pictures are: distances between sets, in the suite's named features.

A row of these scores is one subset of pictures: KID is unbiased in the size of a subset, so rows of two models over
the same subsets are compared in pairs as pictures are elsewhere. Frechet distance, precision and recall are of all
samples together, the same in every row.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rayscale import distributions, latents
from rayscale.contract import Scores
from rayscale.data.shards import open_split
from rayscale.errors import DivergedError
from rayscale.evaluate.model import Model, finite_u8
from rayscale.evaluate.suite import Suite, pairs
from rayscale.features import open_features
from rayscale.imaging import F32, U8, panel
from rayscale.observe import log

METRICS = {
    "neg_kid": "-1000 KID",
    "neg_frechet": "-Frechet distance",
    "precision": "precision",
    "recall": "recall",
}
BASELINE = "gaussian"
LEAST_SAMPLES = 1000
SUBSETS = 20
_BATCH = 64
_TRAIN_AT_MOST = 5000  # photos that the baseline is fitted to


def score(model: Model, suite: Suite, subject: str, provider: str = "") -> Scores:
    """Score a generator against the suite's photos; classes, where it has any, take turns.

    Pictures that are not finite score NaN in every metric, so no gate passes them.
    """
    try:
        return _score(samples(model, _count(suite)), suite, subject, provider)
    except DivergedError as error:
        log.warning("%s: %s", subject, error)
        nothing = dict.fromkeys(METRICS, (np.nan,) * SUBSETS)
        return Scores(subject=subject, suite=suite.digest, keys=_KEYS, metrics=nothing, provider=provider)


def score_baseline(suite: Suite) -> Scores:
    """Pictures drawn from a Gaussian fitted to the pixels of the dataset's training photos."""
    count = min(len(open_split(suite.photos_uri, "train")), _TRAIN_AT_MOST)
    train = Suite(suite.photos_uri, "train", suite.degradation, max_images=count, fit_px=suite.fit_px,
                  side_px=suite.side_px)  # fmt: skip
    pictures = np.stack([pair.hr for pair in pairs(train)])
    return _score(distributions.gaussian_pixels(pictures, _count(suite), seed=1), suite, BASELINE, "")


def samples(model: Model, count: int, seed: int = 0) -> U8:
    """u8[count, h, w, 3]: picture i is that of (seed, i), whatever the count. Raises: DivergedError."""
    found = []
    for start in range(0, count, _BATCH):
        num = min(_BATCH, count - start)
        given: dict[str, F32] = {}
        for tensor in model.spec.inputs:
            size = tensor.shape[1]
            assert isinstance(size, int), tensor
            if tensor.name == "label":
                given["label"] = latents.one_hot([(start + i) % size for i in range(num)], size)
            else:
                given[tensor.name] = latents.latents(seed, num, size, first=start)
        batch = model.forward(given)[model.spec.outputs[0].name]
        found += [finite_u8(picture[None]) for picture in batch]
    return np.stack(found)


def sample_grid(model: Model, max_images: int) -> U8:
    """Always the same seeds, so that grids of a run can be compared."""
    pictures = samples(model, max_images)
    return panel([(f"seed 0, {i}", picture) for i, picture in enumerate(pictures)], columns=8)


_KEYS = tuple(f"subset {i}" for i in range(SUBSETS))


def _count(suite: Suite) -> int:
    return suite.num_samples or max(LEAST_SAMPLES, len(_real(suite)[0]))


def _score(pictures: U8, suite: Suite, subject: str, provider: str) -> Scores:
    _, real = _real(suite)
    found = open_features(suite.features)(pictures)
    least = min(len(real), len(found))
    size = max(2, min(1000, least * 2 // 3))
    draw = np.random.Generator(np.random.Philox(0))
    kid = []
    for _ in range(SUBSETS):
        a, b = (draw.choice(len(x), size, replace=False) for x in (real, found))
        kid.append(-1000 * distributions.mmd2(real[a], found[b]))
    frechet = -distributions.frechet(distributions.fit_gaussian(real), distributions.fit_gaussian(found))
    spaced = [x[[i * len(x) // least for i in range(least)]] for x in (real, found)]  # a split may be sorted by class
    shares = distributions.precision_recall(*spaced, k=min(3, least - 1))
    values = {
        "neg_kid": tuple(kid),
        "neg_frechet": (frechet,) * SUBSETS,
        "precision": (shares.precision,) * SUBSETS,
        "recall": (shares.recall,) * SUBSETS,
    }
    return Scores(subject=subject, suite=suite.digest, keys=_KEYS, metrics=values, provider=provider)


@lru_cache(maxsize=4)
def _real(suite: Suite) -> tuple[U8, F32]:
    """The photos and their features, kept: a run is validated many times on one suite."""
    pictures = np.stack([pair.hr for pair in pairs(suite)])
    return pictures, open_features(suite.features)(pictures)
