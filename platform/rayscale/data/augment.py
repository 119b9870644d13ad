"""Augmentations: what is done to a photo's crop before it is degraded, so that both pictures of a pair stay in step.

Plain values, like a degradation's operators. Geometry (`Rotate`, `Translate`, `Zoom`) is one interpolation of the
photo itself, with its own pixels around the crop; colour acts on the crop's pixels; `Mirror` and `QuarterTurn` turn
every finished tensor of the sample alike. Each is applied with its `probability`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import pydantic
from numpy.typing import NDArray

from rayscale.data.draws import Chain, Draws
from rayscale.data.kernels import to_u8
from rayscale.data.operators import Range
from rayscale.data.value import Value
from rayscale.imaging import F32, U8

Affine = NDArray[np.float64]
"""[2, 3]: (x, y, 1) of a pixel in the crop's window -> (x, y) in the photo, pixels."""


@dataclass(frozen=True, kw_only=True)
class _Augmentation(Value):
    probability: float = 1.0

    def _check(self) -> None:
        self._probability("probability")


@dataclass(frozen=True, kw_only=True)
class Mirror(_Augmentation):
    """Left and right exchanged."""

    probability: float = 0.5
    name: Literal["mirror"] = "mirror"


@dataclass(frozen=True, kw_only=True)
class QuarterTurn(_Augmentation):
    """By 0, 90, 180 or 270 degrees, each as likely."""

    name: Literal["quarter_turn"] = "quarter_turn"


@dataclass(frozen=True, kw_only=True)
class Rotate(_Augmentation):
    """About the crop's centre, by up to so many degrees each way."""

    degrees: float
    name: Literal["rotate"] = "rotate"

    def _check(self) -> None:
        super()._check()
        self._require("degrees", 0 <= self.degrees <= 45, "must be in 0..45", "try 5")


@dataclass(frozen=True, kw_only=True)
class Translate(_Augmentation):
    """By up to so many pixels each way, fractions included."""

    px: float
    name: Literal["translate"] = "translate"

    def _check(self) -> None:
        super()._check()
        self._require("px", 0 <= self.px <= 256, "must be in 0..256", "try 0.5")


@dataclass(frozen=True, kw_only=True)
class Zoom(_Augmentation):
    """The photo `factor` times as large (antialiased where smaller), drawn on a logarithmic scale."""

    factor: Range
    name: Literal["zoom"] = "zoom"

    def _check(self) -> None:
        super()._check()
        self._range("factor", 0.125, 8)


@dataclass(frozen=True, kw_only=True)
class Brightness(_Augmentation):
    """x + offset."""

    offset: Range  # of 0..255
    name: Literal["brightness"] = "brightness"

    def _check(self) -> None:
        super()._check()
        self._range("offset", -255, 255)


@dataclass(frozen=True, kw_only=True)
class Contrast(_Augmentation):
    """Distance from middle gray, times a factor."""

    factor: Range
    name: Literal["contrast"] = "contrast"

    def _check(self) -> None:
        super()._check()
        self._range("factor", 0)


@dataclass(frozen=True, kw_only=True)
class Saturation(_Augmentation):
    """Distance from the pixel's own gray, times a factor."""

    factor: Range
    name: Literal["saturation"] = "saturation"

    def _check(self) -> None:
        super()._check()
        self._range("factor", 0)


@dataclass(frozen=True, kw_only=True)
class Hue(_Augmentation):
    """Colours turned about the gray axis, by up to so many degrees each way."""

    degrees: float
    name: Literal["hue"] = "hue"

    def _check(self) -> None:
        super()._check()
        self._require("degrees", 0 <= self.degrees <= 180, "must be in 0..180", "try 10")


@dataclass(frozen=True, kw_only=True)
class ChannelGain(_Augmentation):
    """Each channel times a factor of its own: another light."""

    factor: Range
    name: Literal["channel_gain"] = "channel_gain"

    def _check(self) -> None:
        super()._check()
        self._range("factor", 0)


Augmentation = Annotated[
    Mirror | QuarterTurn | Rotate | Translate | Zoom | Brightness | Contrast | Saturation | Hue | ChannelGain,
    pydantic.Field(discriminator="name"),
]
"""The closed union of all augmentations."""


def is_geometry(augmentation: Augmentation) -> bool:
    """Whether it moves pixels by fractions of them."""
    return type(augmentation) in _MOVES


def place(augment: Sequence[Augmentation], chain: Chain, centre: tuple[float, float]) -> Affine:
    """Where the window's pixels lie in the photo; the identity where nothing is moved. centre: (x, y) of the crop."""
    matrix = np.eye(3)
    for augmentation in augment:
        if is_geometry(augmentation):
            draws = chain.next(augmentation.name)
            if draws.chance("taken", augmentation.probability):
                matrix = _MOVES[type(augmentation)](augmentation, draws) @ matrix
    to, back = np.eye(3), np.eye(3)
    to[:2, 2], back[:2, 2] = -np.array(centre), centre
    return np.asarray((back @ matrix @ to)[:2])


def _rotate(augmentation: Rotate, draws: Draws) -> Affine:
    angle = math.radians(draws.uniform("degrees", -augmentation.degrees, augmentation.degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _translate(augmentation: Translate, draws: Draws) -> Affine:
    dx, dy = (draws.uniform(key, -augmentation.px, augmentation.px) for key in ("dx", "dy"))
    return np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1]])


def _zoom(augmentation: Zoom, draws: Draws) -> Affine:
    factor = math.exp(draws.uniform("log_factor", *(math.log(f) for f in augmentation.factor)))
    return np.diag([1 / factor, 1 / factor, 1])


_MOVES: dict[type, Callable[[Any, Draws], Affine]] = {Rotate: _rotate, Translate: _translate, Zoom: _zoom}


def window(photo: U8, affine: Affine, left: int, top: int, width: int, height: int) -> U8:
    """u8[height, width, 3] of the photo as `affine` places it, antialiased where that shrinks it.

    Outside, the photo goes on mirrored about its edges, again and again.
    """
    affine = _folded(affine, photo, (left + (width - 1) / 2, top + (height - 1) / 2))
    step = math.sqrt(abs(np.linalg.det(affine[:, :2])))  # photo pixels a window pixel
    around = math.ceil(_AROUND * max(step, 1))
    corners = np.array([[x, y, 1] for x in (left, left + width - 1) for y in (top, top + height - 1)]) @ affine.T
    low = np.maximum(np.floor(corners.min(0)).astype(int) - around, 0)
    high = np.minimum(np.ceil(corners.max(0)).astype(int) + around + 1, (photo.shape[1], photo.shape[0]))
    source, shrunk = photo[low[1] : high[1], low[0] : high[0]], np.ones(2)
    if step > 1:  # antialias
        sides = [max(1, round(side / step)) for side in source.shape[1::-1]]
        shrunk = np.array(sides) / source.shape[1::-1]
        source = cv2.resize(np.ascontiguousarray(source), sides, interpolation=cv2.INTER_AREA)
    to_source = affine.copy()
    to_source[:, 2] += affine[:, :2] @ (left, top) - low
    to_source *= shrunk[:, None]
    to_source[:, 2] += shrunk / 2 - 0.5  # centres of pixels stay centres
    how = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    moved: U8 = cv2.warpAffine(
        np.ascontiguousarray(source), to_source, (width, height), flags=how, borderMode=cv2.BORDER_REFLECT
    )
    return moved


def _folded(affine: Affine, photo: U8, centre: tuple[float, float]) -> Affine:
    """One that shows the same of the mirrored plane, with the window's centre over the photo itself.

    So what lies over an edge mirrors pixels that the window holds as well, and the source can be cut out.
    """
    sides = np.array(photo.shape[1::-1])
    tile = np.floor((affine @ (*centre, 1) + 0.5) / sides)
    odd = tile % 2  # a mirrored one
    folded: Affine = (1 - 2 * odd)[:, None] * affine
    folded[:, 2] += np.where(odd, (tile + 1) * sides - 1, -tile * sides)
    return folded


_AROUND = 8  # pixels of the window, or of the photo where it is enlarged, for the interpolation and the antialiasing


def colour(augment: Sequence[Augmentation], picture: U8, chain: Chain) -> U8:
    """The colour augmentations, in order, on u8[h, w, 3]."""
    for augmentation in augment:
        if type(augmentation) in _COLOURS:
            draws = chain.next(augmentation.name)
            if draws.chance("taken", augmentation.probability):
                picture = _COLOURS[type(augmentation)](augmentation, picture, draws)
    return picture


def _brightness(augmentation: Brightness, picture: U8, draws: Draws) -> U8:
    return _table(picture, _LEVELS + draws.uniform("offset", *augmentation.offset))


def _contrast(augmentation: Contrast, picture: U8, draws: Draws) -> U8:
    return _table(picture, (_LEVELS - 127.5) * draws.uniform("factor", *augmentation.factor) + 127.5)


def _channel_gain(augmentation: ChannelGain, picture: U8, draws: Draws) -> U8:
    gains = [draws.uniform(key, *augmentation.factor) for key in ("red", "green", "blue")]
    return _table(picture, _LEVELS[:, None] * gains)


def _saturation(augmentation: Saturation, picture: U8, draws: Draws) -> U8:
    factor = draws.uniform("factor", *augmentation.factor)
    return _mixed(picture, factor * np.eye(3) + (1 - factor) * np.array([_LUMA] * 3))


def _hue(augmentation: Hue, picture: U8, draws: Draws) -> U8:
    angle = math.radians(draws.uniform("degrees", -augmentation.degrees, augmentation.degrees))
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # Rodrigues' formula about (1, 1, 1)
    turned = math.cos(angle) * np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * np.full((3, 3), 1 / 3)
    return _mixed(picture, turned)


_COLOURS: dict[type, Callable[[Any, U8, Draws], U8]] = {
    Brightness: _brightness,
    Contrast: _contrast,
    ChannelGain: _channel_gain,
    Saturation: _saturation,
    Hue: _hue,
}
_LEVELS = np.arange(256, dtype=np.float64)
_LUMA = (0.299, 0.587, 0.114)


def _table(picture: U8, levels: NDArray[np.float64]) -> U8:
    table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    looked_up: U8 = cv2.LUT(picture, table[None] if table.ndim == 2 else table)
    return looked_up


def _mixed(picture: U8, matrix: NDArray[np.float64]) -> U8:
    mixed: F32 = cv2.transform(picture.astype(np.float32), matrix.astype(np.float32))
    return to_u8(mixed)


def turn(augment: Sequence[Augmentation], flips: bool, tensors: dict[str, U8], chain: Chain) -> dict[str, U8]:
    """Mirrorings and quarter turns of every tensor [..., h, w, c] alike. flips: all eight, each as likely."""
    for augmentation in augment:
        if isinstance(augmentation, Mirror):
            if chain.next(augmentation.name).chance("taken", augmentation.probability):
                tensors = {name: tensor[..., ::-1, :] for name, tensor in tensors.items()}
        elif isinstance(augmentation, QuarterTurn):
            draws = chain.next(augmentation.name)
            if draws.chance("taken", augmentation.probability):
                tensors = _turned(tensors, draws.integer("turns", 0, 3))
    if flips:
        draws = chain.next("flips")
        turns, mirrored = draws.integer("turns", 0, 3), draws.chance("mirrored", 0.5)
        tensors = {name: tensor[..., ::-1, :] if mirrored else tensor for name, tensor in tensors.items()}
        tensors = _turned(tensors, turns)
    return tensors


def _turned(tensors: dict[str, U8], turns: int) -> dict[str, U8]:
    return {name: np.rot90(tensor, turns, (-3, -2)) for name, tensor in tensors.items()}
