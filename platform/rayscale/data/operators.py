"""What a degradation is made of: frozen dataclasses that are their own config.

A degradation is a tuple of these, applied in order; `name` tells them apart in JSON, digests and on the command line.
Ranges are (low, high), drawn from uniformly, anew for every sample. To add an operator: its dataclass here, named in
`Operator`, and its function in the table of `degrade.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

from rayscale.data.value import Value

Border = Literal["replicate", "mirror"]
Method = Literal["nearest", "bilinear", "bicubic", "area", "lanczos"]
MaskKind = Literal["box", "strokes", "irregular"]
Sampling = Literal["444", "422", "420"]
Range = tuple[float, float]

METHODS: tuple[Method, ...] = ("area", "bilinear", "bicubic")  # what the published chains choose from
ODD_SIZES = tuple(range(7, 22, 2))


@dataclass(frozen=True, kw_only=True)
class Bicubic(Value):
    """MATLAB's antialiased bicubic, `scale` times smaller than what it is given, to the bit. Draws nothing.

    border: "replicate" as the classic test sets were made, "mirror" as newer MATLAB and BasicSR do.
    """

    scale: int
    border: Border = "replicate"
    name: Literal["bicubic"] = "bicubic"

    def _check(self) -> None:
        self._require("scale", self.scale >= 1, "must be at least 1", "try 2")
        self._require("border", self.border in ("replicate", "mirror"), "must be replicate or mirror", "choose one")


@dataclass(frozen=True, kw_only=True)
class Resize(Value):
    """To exactly 1/scale of the picture that the whole chain was given, by one of OpenCV's `methods`.

    Only "area" antialiases; the others do as torch's and OpenCV's do, which the published chains use.
    """

    scale: int
    methods: tuple[Method, ...] = METHODS
    name: Literal["resize"] = "resize"

    def _check(self) -> None:
        self._require("scale", self.scale >= 1, "must be at least 1", "try 4")
        self._require("methods", bool(self.methods), "must name at least one", "e.g. area")


@dataclass(frozen=True, kw_only=True)
class RandomResize(Value):
    """Both sides times a factor: in (1, high) or (low, 1), or 1. Ends at a random size.

    probabilities: of up, down and keep. scale: 0 makes it a factor of the picture it is given, n of 1/n of the
    picture that the whole chain was given.
    """

    probabilities: tuple[float, float, float]
    factor: Range
    scale: int = 0
    methods: tuple[Method, ...] = METHODS
    name: Literal["random_resize"] = "random_resize"

    def _check(self) -> None:
        rule = "must be three weights (up, down, keep), not all 0"
        weights = self.probabilities
        self._require("probabilities", min(weights) >= 0 and sum(weights) > 0, rule, "e.g. 0.2, 0.7, 0.1")
        low, high = self.factor
        self._require("factor", 0 < low <= 1 <= high, "must be (low, high) with 0 < low <= 1 <= high", "e.g. 0.15, 1.5")
        self._require("scale", self.scale >= 0, "must not be negative", "0 is the picture it is given")
        self._require("methods", bool(self.methods), "must name at least one", "e.g. area")


@dataclass(frozen=True, kw_only=True)
class Shrink(Value):
    """Both sides divided by a ratio. Ends at a random size."""

    ratio: Range
    methods: tuple[Method, ...] = METHODS
    name: Literal["shrink"] = "shrink"

    def _check(self) -> None:
        self._range("ratio", 1)
        self._require("methods", bool(self.methods), "must name at least one", "e.g. area")


@dataclass(frozen=True, kw_only=True)
class Decimate(Value):
    """The classical degradation: a Gaussian about the centre of each scale x scale cell, and one pixel a cell."""

    scale: int
    sigma: Range  # pixels it is given
    name: Literal["decimate"] = "decimate"

    def _check(self) -> None:
        self._require("scale", self.scale >= 1, "must be at least 1", "try 2")
        self._range("sigma", 0)


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(Value):
    """A Gaussian, generalised Gaussian or plateau-shaped kernel, as BasicSR defines them.

    With m the squared Mahalanobis distance: exp(-m / 2), exp(-m^beta / 2) and 1 / (1 + m^beta). An anisotropic one
    draws both sigmas and a rotation. Half of the betas are drawn below 1, half above.
    """

    sigma: Range  # pixels
    sizes: tuple[int, ...] = ODD_SIZES  # sides of the kernel, each as likely
    shape: Literal["gaussian", "generalised", "plateau"] = "gaussian"
    isotropic: bool = True
    beta: Range = (1.0, 1.0)
    uniform_in: Literal["sigma", "variance"] = "sigma"  # what is drawn uniformly: sigma, or its square
    name: Literal["gaussian_blur"] = "gaussian_blur"

    def _check(self) -> None:
        self._range("sigma", 0)
        low, high = self.beta
        self._require("beta", 0 < low <= 1 <= high, "must be (low, high) with 0 < low <= 1 <= high", "e.g. 0.5, 4")
        self._require("sizes", _odd(self.sizes), "must be odd sides of 1 px or more", "e.g. 7, 9, 11")


@dataclass(frozen=True, kw_only=True)
class Sinc(Value):
    """A circular low-pass filter of finite size: ringing, as sharpening and compression leave it."""

    cutoff: Range = (math.pi / 3, math.pi)  # radians a pixel
    sizes: tuple[int, ...] = ODD_SIZES
    name: Literal["sinc"] = "sinc"

    def _check(self) -> None:
        self._range("cutoff", 0.1, math.pi)
        self._require("sizes", _odd(self.sizes), "must be odd sides of 1 px or more", "e.g. 7, 9, 11")


@dataclass(frozen=True, kw_only=True)
class MotionBlur(Value):
    """Along a straight line, in any direction."""

    length: Range  # pixels
    name: Literal["motion_blur"] = "motion_blur"

    def _check(self) -> None:
        self._range("length", 0, 64)


@dataclass(frozen=True, kw_only=True)
class Defocus(Value):
    """A disc: what a lens out of focus makes of a point."""

    radius: Range  # pixels
    name: Literal["defocus"] = "defocus"

    def _check(self) -> None:
        self._range("radius", 0, 32)


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Value):
    """gray: probability of one field for all channels; correlated: of channels mixed at random (BSRGAN), at the
    range's upper end. Else each channel has a field of its own.
    """

    sigma: Range  # 0..255
    gray: float = 0.0
    correlated: float = 0.0
    name: Literal["gaussian_noise"] = "gaussian_noise"

    def _check(self) -> None:
        self._range("sigma", 0, 255)
        self._probability("gray", "correlated")
        self._require("correlated", self.gray + self.correlated <= 1, "plus gray must be at most 1", "lower one")


@dataclass(frozen=True, kw_only=True)
class PoissonNoise(Value):
    """Shot noise times a factor, as BasicSR defines it: of x * n, n the power of two not below the number of values
    in the picture. gray: probability that one field, of the luma, is added to all channels.
    """

    scale: Range
    gray: float = 0.0
    name: Literal["poisson_noise"] = "poisson_noise"

    def _check(self) -> None:
        self._range("scale", 0)
        self._probability("gray")


@dataclass(frozen=True, kw_only=True)
class SpeckleNoise(Value):
    """Gaussian noise in proportion to the pixel: x + x * n."""

    sigma: Range  # 0..255, at white
    gray: float = 0.0
    name: Literal["speckle_noise"] = "speckle_noise"

    def _check(self) -> None:
        self._range("sigma", 0, 255)
        self._probability("gray")


@dataclass(frozen=True, kw_only=True)
class SaltPepper(Value):
    """Some pixels turned white (`salt` of them) or black, in all channels."""

    amount: Range  # fraction of the pixels
    salt: float = 0.5
    name: Literal["salt_pepper"] = "salt_pepper"

    def _check(self) -> None:
        self._range("amount", 0, 1)
        self._probability("salt")


@dataclass(frozen=True, kw_only=True)
class Jpeg(Value):
    """Through libjpeg and back."""

    quality: tuple[int, int]
    sampling: tuple[Sampling, ...] = ("420",)  # of chroma, each as likely
    name: Literal["jpeg"] = "jpeg"

    def _check(self) -> None:
        self._range("quality", 1, 100)
        self._require("sampling", bool(self.sampling), "must name at least one", "e.g. 420")


@dataclass(frozen=True, kw_only=True)
class Webp(Value):
    """Through libwebp (lossy) and back."""

    quality: tuple[int, int]
    name: Literal["webp"] = "webp"

    def _check(self) -> None:
        self._range("quality", 1, 100)


@dataclass(frozen=True, kw_only=True)
class Mask(Value):
    """Missing pixels: gives "mask" u8[h, w, 1], 255 where missing, and fills them in "lr". The last of a chain.

    The missing part of the picture is what was drawn from `ratio`, to the pixel, whatever the kind. A network sees so
    many pixels far and no further, whatever the picture's size: `picture_px` lets larger pictures have more holes
    instead of larger ones.
    """

    kinds: tuple[MaskKind, ...] = ("box", "strokes", "irregular")  # each as likely
    ratio: Range = (0.1, 0.4)
    fill: int = 0
    picture_px: int = 0  # holes are as large as in a picture of this longer side; 0: of its own
    name: Literal["mask"] = "mask"

    def _check(self) -> None:
        self._range("ratio", 0, 1)
        self._require("fill", 0 <= self.fill <= 255, "must be in 0..255", "0 is black")
        self._require("picture_px", self.picture_px == 0 or self.picture_px >= 16, "must be 0 or at least 16 px",
                      "the side of the crops is a good one")  # fmt: skip
        self._require("kinds", bool(self.kinds), "must name at least one", "e.g. box")


@dataclass(frozen=True, kw_only=True)
class Burst(Value):
    """T frames of one photo: gives "lr" u8[T, h, w, 3]. The last of a chain.

    Each frame but the first is shifted and turned about the picture's centre. `shared` is drawn once and degrades
    every frame alike (lens, sensor grid); `each` is drawn for every frame (noise, compression).
    """

    frames: int
    shift_px: float  # of the picture it is given, each way
    degrees: float = 0.0  # each way
    shared: tuple[Operator, ...] = ()
    each: tuple[Operator, ...] = ()
    name: Literal["burst"] = "burst"

    def _check(self) -> None:
        self._require("frames", 1 <= self.frames <= 64, "must be in 1..64", "try 8")
        self._require("shift_px", self.shift_px >= 0, "must not be negative", "0 keeps frames in place")
        self._require("degrees", 0 <= self.degrees <= 45, "must be in 0..45", "try 1")


@dataclass(frozen=True, kw_only=True)
class Sometimes(Value):
    """The operators, all of them, with this probability."""

    probability: float
    operators: tuple[Operator, ...]
    name: Literal["sometimes"] = "sometimes"

    def _check(self) -> None:
        self._probability("probability")


@dataclass(frozen=True, kw_only=True)
class OneOf(Value):
    """One of several chains, drawn in proportion to the weights; no weights are equal ones."""

    options: tuple[tuple[Operator, ...], ...]
    weights: tuple[float, ...] = ()
    name: Literal["one_of"] = "one_of"

    def _check(self) -> None:
        self._require("options", bool(self.options), "must not be empty", "add a chain")
        good = not self.weights or (
            len(self.weights) == len(self.options) and min(self.weights) >= 0 < sum(self.weights)
        )
        self._require("weights", good, f"must be one for each of {len(self.options)} options", "correct it")


@dataclass(frozen=True, kw_only=True)
class Shuffled(Value):
    """The operators in a random order; those at the indices `ordered` keep the order they have among themselves."""

    operators: tuple[Operator, ...]
    ordered: tuple[int, ...] = ()
    name: Literal["shuffled"] = "shuffled"

    def _check(self) -> None:
        good = list(self.ordered) == sorted(set(self.ordered)) and set(self.ordered) <= set(range(len(self.operators)))
        self._require("ordered", good, f"must be ascending indices into {len(self.operators)} operators", "correct it")


Operator = Annotated[
    Bicubic
    | Resize
    | RandomResize
    | Shrink
    | Decimate
    | GaussianBlur
    | Sinc
    | MotionBlur
    | Defocus
    | GaussianNoise
    | PoissonNoise
    | SpeckleNoise
    | SaltPepper
    | Jpeg
    | Webp
    | Mask
    | Burst
    | Sometimes
    | OneOf
    | Shuffled,
    pydantic.Field(discriminator="name"),
]
"""The closed union of all operators."""


def inner(operator: Any) -> tuple[tuple[Operator, ...], ...]:
    """The chains that an operator is composed of; none of a plain one."""
    if isinstance(operator, OneOf):
        return operator.options
    if isinstance(operator, Sometimes | Shuffled):
        return (operator.operators,)
    return (operator.shared, operator.each) if isinstance(operator, Burst) else ()


def walk(operators: Sequence[Operator]) -> list[Operator]:
    """All operators of a chain, composed ones and what they hold, depth first."""
    found: list[Operator] = []
    for operator in operators:
        found.append(operator)
        for chain in inner(operator):
            found += walk(chain)
    return found


def _odd(sizes: Sequence[int]) -> bool:
    return bool(sizes) and all(size >= 1 and size % 2 for size in sizes)
