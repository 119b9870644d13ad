"""Blur kernels f64[k, k] whose values sum to 1, and the fast way to filter with one."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from rayscale.data.draws import Draws
from rayscale.data.operators import Defocus, GaussianBlur, MotionBlur, Sinc
from rayscale.imaging import F32, U8

Kernel = NDArray[np.float64]

_LOST = 2.0**-11  # of a kernel's absolute mass may be left out: at most an eighth of a grey level
_DIRECT_SIZE = 11  # above it OpenCV goes through a Fourier transform, which costs more than several separable passes
_RANK_MAX = 5


def gaussian_blur(operator: GaussianBlur, picture: U8, draws: Draws) -> U8:
    """See `GaussianBlur`."""
    size = draws.pick("size", operator.sizes)
    sigma_x = _sigma(operator, draws, "sigma_x")
    sigma_y, angle = sigma_x, 0.0
    if not operator.isotropic:
        sigma_y, angle = _sigma(operator, draws, "sigma_y"), draws.uniform("angle", -math.pi, math.pi)
    beta = 1.0
    if operator.shape != "gaussian":
        low, high = operator.beta
        beta = draws.uniform("beta", *((low, 1.0) if draws.chance("peaked", 0.5) else (1.0, high)))
    return convolve(picture, gaussian(size, sigma_x, sigma_y, angle, beta=beta, plateau=operator.shape == "plateau"))


def sinc(operator: Sinc, picture: U8, draws: Draws) -> U8:
    """See `Sinc`."""
    size = draws.pick("size", operator.sizes)
    return convolve(picture, low_pass(size, draws.uniform("cutoff", *operator.cutoff)))


def motion_blur(operator: MotionBlur, picture: U8, draws: Draws) -> U8:
    """See `MotionBlur`."""
    length = draws.uniform("length", *operator.length)
    return convolve(picture, line(length, draws.uniform("angle", 0, math.pi)))


def defocus(operator: Defocus, picture: U8, draws: Draws) -> U8:
    """See `Defocus`."""
    return convolve(picture, disc(draws.uniform("radius", *operator.radius)))


def _sigma(operator: GaussianBlur, draws: Draws, key: str) -> float:
    low, high = operator.sigma
    if operator.uniform_in == "variance":
        return math.sqrt(draws.uniform(key.replace("sigma", "variance"), low**2, high**2))
    return draws.uniform(key, low, high)


def gaussian(
    size: int,
    sigma_x: float,
    sigma_y: float,
    angle: float,
    *,
    beta: float = 1.0,
    plateau: bool = False,
    centre: float = 0.0,
) -> Kernel:
    """exp(-m^beta / 2), or 1 / (1 + m^beta), m the squared Mahalanobis distance from the middle + `centre`, pixels."""
    axis = np.arange(size) - size // 2 - centre
    x, y = axis[None, :], axis[:, None]
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    m = ((along / max(sigma_x, _NO_BLUR)) ** 2 + (across / max(sigma_y, _NO_BLUR)) ** 2) ** beta
    kernel = 1 / (1 + m) if plateau else np.exp(-0.5 * (m - m.min()))
    return np.asarray(kernel / kernel.sum())


_NO_BLUR = 1e-3  # pixels: a kernel of one value


def low_pass(size: int, cutoff: float) -> Kernel:
    """The circular low pass of radius `cutoff`, radians a pixel, cut to size x size: cutoff J1(cutoff r) / (2 pi r)."""
    axis = np.arange(size) - size // 2
    squares, place = np.unique(axis[:, None] ** 2 + axis[None, :] ** 2, return_inverse=True)
    r = np.sqrt(squares[1:])
    values = np.concatenate([[cutoff**2 / (4 * np.pi)], cutoff * bessel_j1(cutoff * r) / (2 * np.pi * r)])
    kernel = values[place].reshape(size, size)
    return np.asarray(kernel / kernel.sum())


def bessel_j1(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """J1, by Bessel's integral: the midpoint rule is exact to rounding for 0 <= x <= 100."""
    angle = (np.arange(128) + 0.5) * (np.pi / 128)
    return np.asarray(np.cos(angle - x[:, None] * np.sin(angle)).mean(axis=1))


def line(length: float, angle: float) -> Kernel:
    """A straight line through the middle, `length` px long (1 or less: no blur), its points spread bilinearly."""
    reach = math.ceil(max(length - 1, 0) / 2) + 1
    size = 2 * reach + 1
    steps = np.linspace(-0.5, 0.5, 8 * size + 1) * max(length - 1, 0)
    x, y = reach + steps * math.cos(angle), reach + steps * math.sin(angle)
    kernel = np.zeros((size, size))
    x0, y0 = np.floor(x).astype(np.intp), np.floor(y).astype(np.intp)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.abs(1 - dy - (y - y0)) * np.abs(1 - dx - (x - x0))
        np.add.at(kernel, (np.minimum(y0 + dy, size - 1), np.minimum(x0 + dx, size - 1)), weight)
    return np.asarray(kernel / kernel.sum())


def disc(radius: float) -> Kernel:
    """A filled circle whose rim is one pixel soft."""
    reach = math.ceil(radius)
    axis = np.arange(-reach, reach + 1)
    kernel = np.clip(radius + 0.5 - np.hypot(axis[:, None], axis[None, :]), 0, 1)
    return np.asarray(kernel / kernel.sum())


def convolve(picture: U8, kernel: Kernel) -> U8:
    """Correlate u8[h, w, c] with a kernel of odd sides, mirrored at the border (without the border's own pixel).

    A kernel is cut to where its mass is, then applied as a few separable passes where that is cheaper: an eighth of a
    grey level at most from the plain sum, each.
    """
    small = _trim(kernel)
    size = len(small)
    if size == 1:
        return picture
    u, s, vt = np.linalg.svd(small)
    tails = np.cumsum((s * np.abs(u).sum(0) * np.abs(vt).sum(1))[::-1])[::-1]  # bounds what the rest can add up to
    rank = int(np.count_nonzero(tails > _LOST))
    if rank <= _RANK_MAX and (rank * 2.2 < size if size <= _DIRECT_SIZE else True):
        out: F32 = np.zeros(0, np.float32)
        for i in range(rank):
            root = math.sqrt(s[i])
            part = cv2.sepFilter2D(picture, cv2.CV_32F, vt[i] * root, u[:, i] * root, borderType=cv2.BORDER_REFLECT_101)
            out = cv2.add(out, part) if i else part
    else:
        exact = small.astype(np.float32)
        out = cv2.filter2D(picture.astype(np.float32), -1, exact, borderType=cv2.BORDER_REFLECT_101)
    return to_u8(out)


def to_u8(x: F32) -> U8:
    """Rounded half to even, clipped to 0..255. Overwrites x."""
    np.rint(x, out=x)
    np.clip(x, 0, 255, out=x)
    return x.astype(np.uint8)


def _trim(kernel: Kernel) -> Kernel:
    mass, total, cut = np.abs(kernel), np.abs(kernel).sum(), 0
    while 2 * (cut + 1) < len(kernel) and mass[cut + 1 : -cut - 1, cut + 1 : -cut - 1].sum() >= (1 - _LOST) * total:
        cut += 1
    trimmed = kernel[cut : len(kernel) - cut, cut : len(kernel) - cut]
    return np.asarray(trimmed / trimmed.sum())
