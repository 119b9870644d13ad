"""What a generator is fed: noise by seed, the way from one seed to another, classes. numpy only: serving uses it.

Row `i` of a seed is a pure function of (seed, i): Philox counted by the row, a quantile function of the standard
library. So a seed gives the same picture alone and in any batch, in training's report and behind the endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rayscale.errors import ConfigError

F32 = NDArray[np.float32]

Z_MAX = 4.0  # every component lies within +-Z_MAX: what cards state, and 1 in 16,000 normal draws would leave

_DOMAIN = 0x6C6174656E74  # of the generator's key, so that no other use of a seed draws the same numbers


def latents(seed: int, count: int, size: int, *, truncation: float = Z_MAX, first: int = 0) -> F32:
    """Rows `first` .. `first + count` of a seed: f32[count, size], normal within +-truncation.

    The truncated distribution itself (Brock et al., BigGAN, arXiv:1809.11096), by its quantiles: a smaller truncation
    moves every component continuously toward 0, the mean, where pictures are more typical and less varied.

    Raises: ConfigError for a truncation outside [0, Z_MAX].
    """
    if not 0 <= truncation <= Z_MAX:
        raise ConfigError("truncation", truncation, f"must be within 0 and {Z_MAX:g}", "0.7 is a usual one")
    bits = np.empty((count, size), np.uint64)
    key = np.array([seed & (2**64 - 1), _DOMAIN], np.uint64)  # a list would pass through float64 and lose digits
    for i in range(count):
        generator = np.random.Philox(counter=np.array([0, first + i, 0, 0], np.uint64), key=key)
        bits[i] = generator.random_raw(size)  # the bits are fixed for all versions of numpy; its normal draws are not
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    normal = NormalDist()
    tail = normal.cdf(-truncation)
    quantiles = tail + uniform * (1 - 2 * tail)
    drawn = np.array([normal.inv_cdf(p) for p in quantiles.ravel().tolist()]).reshape(count, size)
    return drawn.astype(np.float32).clip(-truncation, truncation)


def interpolate(start: F32, end: F32, steps: int) -> F32:
    """The way from one latent f32[size] to another, both included: f32[steps, size], along the arc between them.

    On the chord, vectors are shorter than any the generator was trained on (White, arXiv:1609.04468).

    Raises: ConfigError for unlike vectors or fewer than 2 steps.
    """
    if start.shape != end.shape or start.ndim != 1 or steps < 2:
        raise ConfigError(
            "interpolate", f"{start.shape}, {end.shape}, {steps}", "two vectors alike, 2 steps or more", "correct it"
        )
    a, b = start.astype(np.float64), end.astype(np.float64)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    angle = np.arccos(np.clip(a @ b / lengths, -1, 1)) if lengths else 0.0
    share = np.linspace(0.0, 1.0, steps)[:, None]
    if np.sin(angle) < 1e-6:  # parallel, opposite or nothing: the arc is the chord, or any of many
        way = (1 - share) * a + share * b
    else:
        way = (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
    bound = np.abs([a, b]).max(initial=0.0)  # the arc may bulge out of the cube that truncation promises
    return way.clip(-bound, bound).astype(np.float32)


def one_hot(labels: Sequence[int], num_classes: int) -> F32:
    """Classes as the tensor `label` of a conditional model: f32[n, num_classes].

    Raises: ConfigError for a class that is not in range(num_classes).
    """
    for label in labels:
        if not 0 <= label < num_classes:
            raise ConfigError("class", label, f"must be 0 .. {num_classes - 1}", "the card lists the classes in order")
    return np.eye(num_classes, dtype=np.float32)[list(labels)]
