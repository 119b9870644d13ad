"""Pictures as vectors, by a feature net whose name stands beside every score made with it.

A net is an ONNX file by URI, so that any backbone will do, or one of the functions built in, which need no file:

    builtin:colour-texture    colour and edge statistics of 4x4 cells: what a Frechet distance can see without a net
    builtin:colour-histogram  8x8x8 colours: the classical baseline of retrieval
    builtin:pixels            the values themselves: the trivial one

A file has one input f32[n, 3, h, w], RGB. Values lie in [0, 255] where its name ends in 255 ("rgb255"), else in
[0, 1]; any further normalisation is inside the file. Its outputs of rank 2 are features or class probabilities,
those of rank 4 the maps of layers. Frechet distances move by about 1 with the resize: side and filter are part of
the name (Parmar et al. 2022, arXiv 2104.11222).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from rayscale.contract import ModelCard, Spec, TensorSpec
from rayscale.errors import ConfigError, IntegrityError, nearest
from rayscale.imaging import F32, U8
from rayscale.storage import open_store

if TYPE_CHECKING:  # the built-in ones need no ONNX Runtime
    from rayscale.artifact import Device, Session

Filter = Literal["box", "bilinear", "bicubic", "lanczos"]

BATCH = 32  # pictures at once: bounds memory, changes no value
_FILTERS: Mapping[str, Image.Resampling] = {  # all of them low-pass where they shrink
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_BUILTIN = "builtin:"
_CELLS, _ORIENTATIONS, _BINS = 4, 8, 8
_LEAST_PX = 2 * _CELLS  # edges are seen at half the size too


@dataclass(frozen=True, kw_only=True)
class FeatureNet:
    """Which features. Raises: ConfigError."""

    uri: str = "builtin:colour-texture"  # of an ONNX file, or a built-in's name
    side_px: int = 0  # every picture is brought to this square first; 0 leaves them as they are
    filter: Filter = "bicubic"  # that brings them there
    output: str = ""  # of the file; by default its first of rank 2

    def __post_init__(self) -> None:
        if self.side_px < 0:
            raise ConfigError("features.side_px", self.side_px, "must not be negative", "0 leaves pictures as they are")
        if self.filter not in _FILTERS:
            raise ConfigError("features.filter", self.filter, "is no filter", nearest(self.filter, _FILTERS))
        if self.uri.startswith(_BUILTIN) and self.uri not in BUILTINS:
            raise ConfigError("features.uri", self.uri, "is not built in", nearest(self.uri, BUILTINS))
        if self.uri.startswith(_BUILTIN) and self.output:
            raise ConfigError("features.output", self.output, f"{self.uri} has one output", "leave it out")


@dataclass(frozen=True)
class Features:
    """A feature net, ready to be called. `name` tells net, digest, output and resize."""

    name: str
    function: Callable[[U8], F32]  # u8[n, h, w, 3] -> f32[n, d]
    side_px: int = 0
    filter: Filter = "bicubic"

    def __call__(self, pictures: Sequence[U8] | U8) -> F32:
        """u8[h, w, 3] each, or u8[n, h, w, 3] -> f32[n, d]; a picture's row does not depend on the others.

        Raises: ConfigError for no pictures, or unlike sizes where `side_px` does not make them alike.
        """
        if len(pictures) == 0:
            raise ConfigError("pictures", 0, "there must be at least one", "look at the suite")
        return np.concatenate([self.function(batch) for batch in _batches(pictures, self.side_px, self.filter)])


@dataclass(frozen=True)
class Maps:
    """The layers of a feature net, for `metrics.perceptual`."""

    name: str
    function: Callable[[U8], list[F32]]  # u8[n, h, w, 3] -> f32[n, c, h', w'] a layer
    side_px: int = 0
    filter: Filter = "bicubic"

    def __call__(self, pictures: Sequence[U8] | U8) -> list[F32]:
        """All in one batch: layers are large. Raises: as `Features`."""
        stacked = list(_batches(pictures, self.side_px, self.filter, size=len(pictures) or 1))
        if not stacked:
            raise ConfigError("pictures", 0, "there must be at least one", "look at the suite")
        return self.function(stacked[0])


def name_of(net: FeatureNet) -> str:
    """What tells two nets apart: content and resize, not place. Raises: MissingError."""
    if net.uri in BUILTINS:
        return " ".join((net.uri, _resize_name(net)))
    file, data = _read(net)
    return " ".join((f"{file}@{hashlib.sha256(data).hexdigest()[:12]}", net.output, _resize_name(net)))


def open_features(net: FeatureNet, *, device: Device = "cpu", threads: int = 0) -> Features:
    """The net that `net` names.

    Raises: MissingError; IntegrityError for a file that is no ONNX model; ConfigError for one of other inputs or
    outputs; ResourceError for a device that does not start.
    """
    if net.uri in BUILTINS:
        return Features(name_of(net), BUILTINS[net.uri], net.side_px, net.filter)
    opened = _open(net, rank=2, device=device, threads=threads)
    output = opened.outputs[0]
    function = _by_file(opened)
    return Features(opened.name, lambda pictures: function(pictures)[output], net.side_px, net.filter)


def open_maps(net: FeatureNet, *, device: Device = "cpu", threads: int = 0) -> Maps:
    """All layers, or the one named by `net.output`. Raises: as `open_features`; ConfigError for a built-in."""
    if net.uri in BUILTINS:
        raise ConfigError("features.uri", net.uri, "has no layers", "name an ONNX file with outputs of rank 4")
    opened = _open(net, rank=4, device=device, threads=threads)
    function = _by_file(opened)
    return Maps(opened.name, lambda pictures: list(function(pictures).values()), net.side_px, net.filter)


def resized(picture: U8, side_px: int, how: Filter) -> U8:
    """u8[h, w, 3] -> u8[side_px, side_px, 3], its shape ignored as feature nets do; untouched where it has it."""
    if picture.shape[:2] == (side_px, side_px):
        return picture
    return np.asarray(Image.fromarray(picture).resize((side_px, side_px), _FILTERS[how]))


class _Opened(NamedTuple):
    session: Session
    name: str
    outputs: tuple[str, ...]
    high: float  # of the input's values
    batch: int  # pictures a call; 0 is any number


def _open(net: FeatureNet, *, rank: int, device: Device, threads: int) -> _Opened:
    import onnx

    from rayscale.artifact import open_model

    file, data = _read(net)
    try:
        model = onnx.load_from_string(data)
    except Exception as error:  # protobuf's classes share no base of their own
        raise IntegrityError("features.uri", net.uri, "is no ONNX file", f"fetch it again ({error})") from None
    inputs = [i for i in model.graph.input if i.name not in {w.name for w in model.graph.initializer}]
    outputs = {o.name: _shape(o) for o in onnx.shape_inference.infer_shapes(model).graph.output}
    named = [name for name, shape in outputs.items() if len(shape) == rank]
    if net.output and net.output not in named:
        rule = f"is no output of rank {rank} of {file}"
        raise ConfigError("features.output", net.output, rule, nearest(net.output, named))
    kept = (net.output,) if net.output else tuple(named[:1] if rank == 2 else named)
    if len(inputs) != 1 or not kept:
        shown = f"inputs {[i.name for i in inputs]}, outputs {outputs}"
        raise ConfigError("features.uri", shown, f"a feature net has one input and an output of rank {rank}",
                          "export it so")  # fmt: skip
    shape = _shape(inputs[0])
    _check_input(net, shape)
    for output in [o for o in model.graph.output if o.name not in kept]:
        model.graph.output.remove(output)  # what is not asked for is not computed
    high = 255.0 if inputs[0].name.endswith("255") else 1.0
    free = tuple(axis or name for axis, name in zip(shape, "nchw", strict=True))
    spec = Spec(
        kind="embed",
        inputs=(TensorSpec(name=inputs[0].name, shape=free, high=high),),
        outputs=tuple(
            TensorSpec(name=name, shape=tuple(axis or f"free{i}" for i, axis in enumerate(outputs[name])))
            for name in kept
        ),
    )
    card = ModelCard(family="features", spec=spec, licence="")
    session = open_model(model.SerializeToString(), card, device=device, threads=threads)
    name = f"{file}@{hashlib.sha256(data).hexdigest()[:12]} {'+'.join(kept)} {_resize_name(net)}"
    return _Opened(session, name, kept, high, shape[0])


def _read(net: FeatureNet) -> tuple[str, bytes]:
    folder, slash, file = net.uri.rpartition("/")
    return file, open_store(folder or slash or ".").read(file)


def _check_input(net: FeatureNet, shape: Sequence[int]) -> None:
    if len(shape) != 4 or shape[1] not in (0, 3):
        raise ConfigError("features.uri", net.uri, f"its input is {list(shape)}, not [n, 3, h, w]", "export it so")
    if any(side not in (0, net.side_px) for side in shape[2:]):
        rule = f"this net takes {shape[2]}x{shape[3]} px only"
        raise ConfigError("features.side_px", net.side_px, rule, f"set side_px={shape[2]}")


def _shape(value: Any) -> list[int]:
    """Fixed sizes as they are, free ones as 0."""
    return [int(axis.dim_value) for axis in value.type.tensor_type.shape.dim]


def _by_file(opened: _Opened) -> Callable[[U8], dict[str, F32]]:
    entry = opened.session.card.spec.inputs[0].name

    def function(pictures: U8) -> dict[str, F32]:
        nchw = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32)
        if opened.high == 1.0:
            nchw /= np.float32(255.0)
        step = opened.batch or len(nchw)
        parts = [opened.session.run({entry: nchw[i : i + step]}) for i in range(0, len(nchw), step)]
        return {name: np.concatenate([part[name] for part in parts]) for name in opened.outputs}

    return function


def _batches(pictures: Sequence[U8] | U8, side_px: int, how: Filter, size: int = BATCH) -> Iterator[U8]:
    for start in range(0, len(pictures), size):
        batch = pictures[start : start + size]
        if side_px:
            batch = [resized(picture, side_px, how) for picture in batch]
        shapes = {picture.shape for picture in batch}
        if len(shapes) > 1:
            raise ConfigError("pictures", sorted(shapes), "must be of one size", "set side_px of the features")
        yield np.asarray(batch)


def _resize_name(net: FeatureNet) -> str:
    return f"{net.side_px} px {net.filter}" if net.side_px else "as is"


def _colour_texture(pictures: U8) -> F32:
    """f32[n, 361]: of 4x4 cells mean and deviation of gray, red - green and blue - green, and edge energy by direction
    on two scales; then the energies of three frequency bands.

    Edges: histograms of oriented gradients (Dalal, Triggs 2005) without their block normalisation, so that the
    strength of an edge counts; bands: means of the absolute Laplacian pyramid (Burt, Adelson 1983).
    """
    if min(pictures.shape[1:3]) < _LEAST_PX:
        raise ConfigError("pictures", pictures.shape, f"sides must be {_LEAST_PX} px or more", "set side_px")
    return np.stack([_statistics(picture) for picture in pictures])


def _statistics(picture: U8) -> F32:
    red, green, blue = picture.astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    x = np.stack([(red + 2 * green + blue) / 4, red - green, blue - green], axis=-1)
    mean = _cells(x)
    deviation = np.sqrt(np.maximum(_cells(x * x) - mean * mean, 0))
    parts = [mean, deviation, _edges(x[..., 0]), _edges(_half(x[..., 0]))]
    for _ in range(3):
        smooth = cv2.GaussianBlur(x, (5, 5), 1.0)
        parts.append(np.abs(x - smooth).mean(axis=(0, 1)))
        x = _half(smooth)
    return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


def _edges(plane: F32) -> F32:
    """f32[h, w] -> f32[4, 4, 8]: root mean square gradient of each cell, by direction without sign."""
    dx, dy = (cv2.Sobel(plane, cv2.CV_32F, *order, ksize=3) for order in ((1, 0), (0, 1)))
    angle = (np.arctan2(dy, dx) % np.pi) * (_ORIENTATIONS / np.pi)
    low = np.floor(angle)
    share = angle - low  # between the two nearest directions: nothing jumps
    bins = np.arange(_ORIENTATIONS)
    index = low.astype(np.intp)[..., None] % _ORIENTATIONS
    weights = np.where(bins == index, 1 - share[..., None], 0) + np.where(
        bins == (index + 1) % _ORIENTATIONS, share[..., None], 0
    )
    return np.sqrt(_cells((weights * (dx * dx + dy * dy)[..., None]).astype(np.float32)))


def _cells(maps: F32) -> F32:
    """f32[h, w, c] -> f32[4, 4, c], means."""
    rows, columns = (np.arange(_CELLS + 1) * side // _CELLS for side in maps.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(maps, rows[:-1], axis=0), columns[:-1], axis=1)
    return np.asarray(sums / (np.diff(rows)[:, None] * np.diff(columns))[..., None], np.float32)


def _half(maps: F32) -> F32:
    height, width = (side // 2 for side in maps.shape[:2])
    return np.asarray(cv2.resize(maps, (width, height), interpolation=cv2.INTER_AREA), np.float32)


def _colour_histogram(pictures: U8) -> F32:
    """f32[n, 512], roots of shares: their Euclidean distance is Hellinger's, up to a factor."""
    step = np.intp(256 // _BINS)
    codes = (pictures // step) @ np.array([_BINS * _BINS, _BINS, 1])
    counts = np.stack([np.bincount(c.ravel(), minlength=_BINS**3) for c in codes])
    return np.asarray(np.sqrt(counts / codes[0].size), np.float32)


def _pixels(pictures: U8) -> F32:
    """f32[n, h * w * 3] in [0, 1]."""
    return pictures.reshape(len(pictures), -1).astype(np.float32) / np.float32(255)


BUILTINS: Mapping[str, Callable[[U8], F32]] = {
    "builtin:colour-texture": _colour_texture,
    "builtin:colour-histogram": _colour_histogram,
    "builtin:pixels": _pixels,
}
