"""Noise and lossy codecs on u8[h, w, 3]."""

from __future__ import annotations

import cv2
import numpy as np

from rayscale.data.draws import Draws
from rayscale.data.kernels import to_u8
from rayscale.data.operators import GaussianNoise, Jpeg, PoissonNoise, SaltPepper, Sampling, SpeckleNoise, Webp
from rayscale.imaging import F32, U8

_KINDS = ("gray", "correlated", "colour")


def gaussian_noise(operator: GaussianNoise, picture: U8, draws: Draws) -> U8:
    """See `GaussianNoise`."""
    kind = _KINDS[draws.weighted("kind", (operator.gray, operator.correlated, 1 - operator.gray - operator.correlated))]
    sigma = operator.sigma[1] if kind == "correlated" else draws.uniform("sigma", *operator.sigma)
    noise = _normal(draws.field(), picture.shape[:2], kind)
    noise *= np.float32(sigma)
    noise += picture
    return to_u8(noise)


def speckle_noise(operator: SpeckleNoise, picture: U8, draws: Draws) -> U8:
    """See `SpeckleNoise`."""
    sigma, gray = draws.uniform("sigma", *operator.sigma), draws.chance("gray", operator.gray)
    noise = _normal(draws.field(), picture.shape[:2], "gray" if gray else "colour")
    noise *= np.float32(sigma / 255)
    noise += 1
    noise *= picture
    return to_u8(noise)


def _normal(rng: np.random.Generator, sides: tuple[int, ...], kind: str) -> F32:
    """f32[h, w, 3], standard normal; correlated: by a random covariance of the channels, of variance 0..1 each."""
    if kind == "gray":
        field: F32 = rng.standard_normal(sides, np.float32)
        noise: F32 = cv2.merge([field, field, field])
        return noise
    noise = rng.standard_normal((*sides, 3), np.float32)
    if kind == "correlated":
        axes = np.linalg.qr(rng.random((3, 3)))[0]
        values, vectors = np.linalg.eigh(np.abs(axes.T @ np.diag(rng.random(3)) @ axes))
        noise = cv2.transform(noise, (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32))
    return noise


def poisson_noise(operator: PoissonNoise, picture: U8, draws: Draws) -> U8:
    """See `PoissonNoise`."""
    scale, gray = draws.uniform("scale", *operator.scale), draws.chance("gray", operator.gray)
    source: U8 = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None] if gray else picture
    used = sum(cv2.calcHist([source], [c], None, [256], [0, 256]) for c in range(source.shape[2]))
    levels = 1 << int(np.count_nonzero(used) - 1).bit_length()  # 2^ceil(log2(number of values))
    noise = poisson(source, levels / 255, draws.field())
    noise *= np.float32(255 / levels)
    noise -= source
    noise *= np.float32(scale)
    return to_u8(noise + picture)


_EXACT_BELOW = 10.0


def poisson(source: U8, gain: float, rng: np.random.Generator) -> F32:
    """Poisson counts of mean source * gain, f32 as `source`.

    Means below 10 are drawn as they are defined. Larger ones, five times as fast, are a normal number with the skew
    of Cornish and Fisher, rounded: mean and variance are exact, the distribution function to 2e-3.
    """
    mean = np.arange(256, dtype=np.float32) * np.float32(gain)
    spread = np.sqrt(np.maximum(mean - np.float32(5 / 36), 0))  # 1/12 comes with the rounding, 1/18 with the skew
    z = rng.standard_normal(source.shape, np.float32)
    counts: F32 = cv2.LUT(source, spread).reshape(source.shape)
    counts *= z
    counts += cv2.LUT(source, mean - np.float32(1 / 6)).reshape(source.shape)
    z *= z
    z /= 6
    counts += z
    np.maximum(np.rint(counts, out=counts), 0, out=counts)
    dark = source < np.searchsorted(mean, _EXACT_BELOW)
    if dark.any():
        counts[dark] = rng.poisson(mean[source[dark]])
    return counts


def salt_pepper(operator: SaltPepper, picture: U8, draws: Draws) -> U8:
    """See `SaltPepper`."""
    amount, rng = draws.uniform("amount", *operator.amount), draws.field()
    level = rng.random(picture.shape[:2], np.float32)
    out = picture.copy()
    out[level < amount] = 0
    out[level < amount * operator.salt] = 255
    return out


_FACTORS: dict[Sampling, int] = {
    "444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "422": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
}


def jpeg(operator: Jpeg, picture: U8, draws: Draws) -> U8:
    """See `Jpeg`."""
    quality, sampling = draws.integer("quality", *operator.quality), draws.pick("sampling", operator.sampling)
    factor = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, _FACTORS[sampling]]
    return _coded(picture, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality, *factor])


def webp(operator: Webp, picture: U8, draws: Draws) -> U8:
    """See `Webp`."""
    return _coded(picture, ".webp", [cv2.IMWRITE_WEBP_QUALITY, draws.integer("quality", *operator.quality)])


def _coded(picture: U8, suffix: str, settings: list[int]) -> U8:
    _, data = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), settings)
    decoded: U8 = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return decoded
