"""Measures that cost more or need a net of their own: asked for by name, higher is better as of all scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from rayscale import metrics
from rayscale.contract import Scores
from rayscale.distributions import Spread, class_score
from rayscale.errors import ConfigError, DivergedError, nearest
from rayscale.evaluate import generated
from rayscale.evaluate.model import Model, Run
from rayscale.evaluate.suite import Suite, pairs
from rayscale.features import BUILTINS, FeatureNet, open_features, open_maps
from rayscale.imaging import U8

TITLES = {
    "ms_ssim_y": "MS-SSIM Y",
    "ms_ssim_rgb": "MS-SSIM RGB",
    "sift_ratio": "SIFT key points found again",
    "neg_perceptual": "-perceptual distance",
}

Measure = Callable[[U8, U8], float]
"""(made, truth), u8[h, w, 3] both -> a value, NaN where it has none."""


def measures(names: Collection[str], suite: Suite) -> dict[str, Measure]:
    """The named ones, of TITLES. `neg_perceptual` is over all layers of the suite's feature net, a file.

    Raises: ConfigError for an unknown name, or a feature net without layers.
    """
    for name in names:
        if name not in TITLES:
            raise ConfigError("measure", name, "is none", nearest(name, TITLES))
    border_px = suite.scale if suite.scale > 1 else 0
    known: dict[str, Measure] = {
        "ms_ssim_y": lambda made, truth: metrics.ms_ssim(made, truth, border_px=border_px, luma_only=True),
        "ms_ssim_rgb": lambda made, truth: metrics.ms_ssim(made, truth, border_px=border_px),
        "sift_ratio": metrics.sift_match_ratio,
    }
    if "neg_perceptual" in names:
        known["neg_perceptual"] = _perceptual(suite)
    return {name: known[name] for name in names}


def with_measures(scores: Scores, run: Run, suite: Suite, names: Collection[str]) -> Scores:
    """`scores` with further metrics, picture by picture; runs anew. What is not finite scores NaN."""
    wanted = measures(names, suite)
    rows: list[tuple[float, ...]] = []
    for pair in pairs(suite):
        try:
            made = run(*pair.inputs)
        except DivergedError:
            rows.append((math.nan,) * len(wanted))
        else:
            rows.append(tuple(measure(made, pair.hr) for measure in wanted.values()))
    return replace(scores, metrics={**scores.metrics, **dict(zip(wanted, zip(*rows, strict=True), strict=True))})


def class_scores(model: Model, suite: Suite, classifier: FeatureNet) -> tuple[str, dict[str, Spread]]:
    """The classifier's name and its Inception-style score of generated pictures and of the suite's photos.

    The samples are those that `generated` scores, shuffled: parts of a set sorted by class would have few classes.
    """
    net = open_features(classifier)
    photos = np.stack([pair.hr for pair in pairs(suite)])
    count = suite.num_samples or max(generated.LEAST_SAMPLES, len(photos))
    found = {}
    for name, pictures in (("generated", generated.samples(model, count)), ("photos", photos)):
        order = np.random.Generator(np.random.Philox(0)).permutation(len(pictures))
        found[name] = class_score(net(pictures[order]), splits=min(10, len(pictures)))
    return net.name, found


def _perceptual(suite: Suite) -> Measure:
    if suite.features.uri in BUILTINS:
        remedy = "name an ONNX file with outputs of rank 4 in the suite's features"
        raise ConfigError("suite.features.uri", suite.features.uri, "has no layers to compare in", remedy)
    maps = open_maps(suite.features)

    def distance(made: U8, truth: U8) -> float:
        return -float(metrics.perceptual(*(maps(np.asarray(p)[None]) for p in (made, truth)))[0])

    return distance
