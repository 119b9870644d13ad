"""What a user would otherwise take: classical filters, each with the settings worth trying.

Pure functions of uint8 pictures: u8[h, w, 3] -> u8[h, w, 3]; upscalers -> u8[h * scale, w * scale, 3]; inpainting
also takes a mask u8[h, w, 1], not 0 where pixels are missing; bursts are u8[T, h, w, 3], the first frame the reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.registration import phase_cross_correlation

from rayscale.errors import ConfigError, nearest
from rayscale.imaging import F32, U8
from rayscale.observe import log

Problem = Literal["upscale", "denoise", "deblock", "deblur", "inpaint", "burst"]
Function = Callable[..., U8]


class Method(NamedTuple):
    """A function and values of its settings worth trying; the first of each is a sensible default."""

    name: str
    function: Function
    grid: Mapping[str, tuple[Any, ...]] = {}

    def default(self) -> Function:
        """With the first of every setting."""
        return next(iter(self.runs().values()))

    def runs(self) -> dict[str, Function]:
        """Every combination of the settings, by what to call it: "bilateral radius_px=3 sigma_color=50"."""
        found: dict[str, Function] = {}
        for values in itertools.product(*self.grid.values()):
            settings = dict(zip(self.grid, values, strict=True))
            label = " ".join([self.name, *(f"{name}={value:g}" for name, value in settings.items())])
            found[label] = functools.partial(self.function, **settings)
        return found


def methods(problem: Problem, scale: int = 1) -> tuple[Method, ...]:
    """The classical methods for a problem; `scale` is how much larger upscaled pictures and bursts become.

    Raises: ConfigError for an unknown problem.
    """
    if problem not in get_args(Problem):
        raise ConfigError("problem", problem, "has no classical methods", nearest(problem, get_args(Problem)))
    if problem in ("upscale", "burst"):
        chosen = _UPSCALE if problem == "upscale" else _BURST
        return tuple(m._replace(function=functools.partial(m.function, scale=scale)) for m in chosen)
    found = _SAME_SIZE[problem]
    if problem == "denoise":
        if importlib.util.find_spec("bm3d"):
            return (*found, Method("bm3d", bm3d, {"sigma": (25, 10, 15, 20, 30, 40, 50)}))
        log.info("classical: BM3D is left out, its library is not installed (pip install bm3d)")
    return found


def best(candidates: tuple[Method, ...], score: Callable[[Function], float]) -> dict[str, tuple[str, float]]:
    """method -> (its best settings, their score), the best method first; `score` is higher for the better."""
    found = {}
    for method in candidates:
        scores = {label: score(run) for label, run in method.runs().items()}
        label = max(scores, key=scores.__getitem__)
        found[method.name] = (label, scores[label])
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


# Upscaling


def upscale(picture: U8, *, scale: int, kind: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic") -> U8:
    """Interpolation (Pillow's: bicubic has a = -0.5 as MATLAB's, lanczos 3 lobes)."""
    height, width = picture.shape[:2]
    how = Image.Resampling[kind.upper()]
    return np.asarray(Image.fromarray(picture).resize((width * scale, height * scale), how))


# Filters of one picture


def unchanged(picture: U8) -> U8:
    """What every restoration must beat first."""
    return picture


def mean(picture: U8, *, size_px: int = 3) -> U8:
    """The mean of a square of odd side."""
    return _u8(cv2.blur(picture, (size_px, size_px)))


def median(picture: U8, *, size_px: int = 3) -> U8:
    """The median of a square of odd side, by channel."""
    return _u8(cv2.medianBlur(picture, size_px))


def gaussian(picture: U8, *, sigma_px: float = 1.0) -> U8:
    """A Gaussian blur."""
    return _u8(cv2.GaussianBlur(picture, (0, 0), sigma_px))


def bilateral(picture: U8, *, sigma_px: float = 2.0, sigma_level: float = 50.0) -> U8:
    """Means over what is near in place and in level, 0..255 (Tomasi and Manduchi, ICCV 1998)."""
    return _u8(cv2.bilateralFilter(picture, 2 * round(2 * sigma_px) + 1, sigma_level, sigma_px))


def nonlocal_means(picture: U8, *, level: float = 10.0) -> U8:
    """Means over alike 7 px patches within 21 px (Buades et al., CVPR 2005), in CIELAB; level: strength, 0..255."""
    return _u8(cv2.fastNlMeansDenoisingColored(picture, None, level, level, 7, 21))


def bm3d(picture: U8, *, sigma: float = 25.0) -> U8:
    """Collaborative filtering of alike blocks (Dabov et al., TIP 2007) of colour, with the library `bm3d`."""
    library = importlib.import_module("bm3d")
    return _u8(library.bm3d_rgb(picture / 255.0, sigma / 255.0) * 255.0)


def unsharp(picture: U8, *, sigma_px: float = 1.0, amount: float = 0.5) -> U8:
    """The picture plus `amount` of what a Gaussian takes away from it."""
    return _u8(_unsharp(picture.astype(np.float32), sigma_px, amount))


def wiener(
    picture: U8, *, radius_px: float = 1.0, noise: float = 0.01, lens: Literal["gaussian", "disc"] = "gaussian"
) -> U8:
    """Wiener's inverse of a blur that is assumed: a Gaussian of sigma or a disc of radius `radius_px`.

    noise: its power over the picture's, the same for all frequencies. The picture is mirrored around itself, so that
    opposite borders do not ring into each other.
    """
    pad = 16 + round(4 * radius_px)
    wide = cv2.copyMakeBorder(picture, pad, pad, pad, pad, cv2.BORDER_REFLECT).astype(np.float32)
    height, width = wide.shape[:2]
    y, x = np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width
    square = x**2 + y**2
    kernel = (
        np.exp(-square / (2 * radius_px**2)) if lens == "gaussian" else np.clip(radius_px + 0.5 - square**0.5, 0, 1)
    )
    response = np.fft.rfft2(kernel / kernel.sum())[..., None]
    inverse = response.conj() / (abs(response) ** 2 + noise)
    inverse /= inverse[0, 0].real  # brightness stays
    found = np.fft.irfft2(np.fft.rfft2(wide, axes=(0, 1)) * inverse, s=(height, width), axes=(0, 1))
    return _u8(found[pad:-pad, pad:-pad])


def telea(picture: U8, mask: U8, *, radius_px: float = 8.0) -> U8:
    """Inpainting from the border inward (Telea, JGT 2004)."""
    return _u8(cv2.inpaint(picture, _missing(mask), radius_px, cv2.INPAINT_TELEA))


def navier_stokes(picture: U8, mask: U8, *, radius_px: float = 8.0) -> U8:
    """Inpainting by fluid dynamics (Bertalmio et al., CVPR 2001)."""
    return _u8(cv2.inpaint(picture, _missing(mask), radius_px, cv2.INPAINT_NS))


def _missing(mask: U8) -> U8:
    return np.ascontiguousarray(mask.reshape(mask.shape[:2]))


# Bursts


def reference(frames: U8, *, scale: int) -> U8:
    """The first frame, bicubic: what one picture gives."""
    return upscale(frames[0], scale=scale)


def shift_and_add(frames: U8, *, scale: int, sigma_px: float = 0.5, amount: float = 0.0) -> U8:
    """Every frame's pixels laid where they belong on the finer grid, and a Gaussian's mean of what lies near.

    Registered as a whole against the first by `register`; a frame without a clear shift is left out.
    sigma_px: in high resolution; amount: of an unsharp mask at the end. Where no pixel lies near, stands the first
    frame, bicubic.
    """
    count, height, width = frames.shape[:3]
    total = np.zeros((height * scale * width * scale, 4), np.float64)
    grays = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in frames]
    for index in range(count):
        shift = (0.0, 0.0) if index == 0 else register(grays[0], grays[index])
        if shift is not None:
            _lay(total, frames[index], shift, scale)
    laid = cv2.GaussianBlur(total.reshape(height * scale, width * scale, 4), (0, 0), sigma_px)
    weight = laid[..., 3:]
    base = upscale(frames[0], scale=scale).astype(np.float64)
    little = 0.02 / scale**2  # of the one pixel a cell that each frame brings
    merged = (laid[..., :3] + little * base) / (weight + little)
    return _u8(_unsharp(merged.astype(np.float32), 1.0, amount))


def register(fixed: F32, moved: F32) -> tuple[float, float] | None:
    """(dx, dy) with moved[y, x] = fixed[y + dy, x + dx], to 1/20 px; None where no shift makes them alike.

    f32[h, w]. The highest point of the cross-correlation, by upsampled Fourier transforms (Guizar-Sicairos et al.,
    Optics Letters 2008), under a Hann window: what enters and leaves at the borders counts little. Not whitened to
    phases alone: noise and aliasing would weigh as much as the picture.
    """
    if min(fixed.shape) < 8 or not (np.ptp(fixed) and np.ptp(moved)):
        return None
    window = np.outer(*(np.hanning(side + 2)[1:-1] for side in fixed.shape))
    centred = ((plane - plane.mean()) * window for plane in (fixed, moved))
    (dy, dx), error, _ = phase_cross_correlation(*centred, upsample_factor=20, normalization=None)
    return (float(dx), float(dy)) if error < 0.7 else None


def _lay(total: NDArray[np.float64], frame: U8, shift: tuple[float, float], scale: int) -> None:
    """Add a frame's pixels and their weights to the four pixels around each place, in shares (bilinear)."""
    height, width = frame.shape[0] * scale, frame.shape[1] * scale
    y = (np.arange(frame.shape[0]) + 0.5 + shift[1]) * scale - 0.5
    x = (np.arange(frame.shape[1]) + 0.5 + shift[0]) * scale - 0.5
    values = np.concatenate([frame, np.ones((*frame.shape[:2], 1))], axis=2)
    for down, right in itertools.product((0, 1), (0, 1)):
        rows, columns = np.floor(y).astype(int) + down, np.floor(x).astype(int) + right
        share = np.outer(1 - abs(y - rows), 1 - abs(x - columns))
        inside = np.outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
        place = (rows[:, None] * width + columns)[inside]
        np.add.at(total, place, (values * share[..., None])[inside])


def _unsharp(picture: F32, sigma_px: float, amount: float) -> F32:
    if amount == 0:
        return picture
    sharp: F32 = picture + amount * (picture - cv2.GaussianBlur(picture, (0, 0), sigma_px))
    return sharp


def _u8(picture: Any) -> U8:
    found: U8 = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return found


_UPSCALE = tuple(
    Method(name, functools.partial(upscale, kind=name)) for name in ("bicubic", "bilinear", "lanczos", "nearest")
)
_UNCHANGED = Method("unchanged", unchanged)
_SMOOTHERS = (
    Method("mean", mean, {"size_px": (3, 5)}),
    Method("median", median, {"size_px": (3, 5)}),
    Method("gaussian", gaussian, {"sigma_px": (0.7, 0.5, 1.0, 1.4, 2.0)}),
)
_SAME_SIZE: dict[str, tuple[Method, ...]] = {
    "denoise": (
        _UNCHANGED,
        *_SMOOTHERS,
        Method("bilateral", bilateral, {"sigma_px": (2.0, 1.0, 3.0), "sigma_level": (90.0, 60.0, 120.0, 180.0)}),
        Method("nonlocal_means", nonlocal_means, {"level": (14.0, 7.0, 10.0, 20.0, 30.0)}),
    ),
    "deblock": (
        _UNCHANGED,
        *_SMOOTHERS,
        Method("bilateral", bilateral, {"sigma_px": (2.0, 1.0), "sigma_level": (30.0, 20.0, 40.0)}),
        Method("nonlocal_means", nonlocal_means, {"level": (3.0, 2.0, 5.0, 7.0)}),
    ),
    "deblur": (
        _UNCHANGED,
        Method("unsharp", unsharp, {"sigma_px": (2.0, 1.0, 3.0), "amount": (0.5, 0.25, 1.0)}),
        Method("wiener_gaussian", wiener, {"radius_px": (1.0, 1.5, 2.0, 3.0), "noise": (0.1, 0.03, 0.3)}),
        Method(
            "wiener_disc",
            functools.partial(wiener, lens="disc"),
            {"radius_px": (2.0, 3.0, 4.0), "noise": (0.1, 0.03, 0.3)},
        ),
    ),
    "inpaint": (
        Method("telea", telea, {"radius_px": (8.0, 3.0, 1.0)}),
        Method("navier_stokes", navier_stokes, {"radius_px": (8.0, 3.0, 1.0)}),
    ),
}
_BURST = (
    Method("bicubic", reference),
    Method("shift_and_add", shift_and_add, {"sigma_px": (0.5, 0.3, 0.7, 1.0), "amount": (1.0, 0.0, 0.5, 1.5, 2.0)}),
)
