"""What crosses the platform: specs, cards, scores, and their JSON. Standard library only; every image imports this.

Every document carries `schema`. An older one is read, a newer one is refused with one line.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rayscale import __version__
from rayscale.errors import ConfigError, nearest

SCHEMA = 1

Kind = Literal["transform", "burst", "generate", "embed"]
"""image[, mask] -> image | frames -> image | noise[, class] -> image | image -> unit vector."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One float32 tensor at the model's boundary, NCHW for pictures.

    A string axis is free ("n", "h", "w") or a multiple of a free one ("2*h"); values lie in [low, high].
    """

    name: str
    shape: tuple[int | str, ...]
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The static half of a card: what one shipped function takes, gives, and how it may be tiled."""

    kind: Kind
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    scale: int = 1  # output side / input side, pixels
    align: int = 1  # input sides are multiples of this, pixels
    halo_px: int | None = None  # input pixels of context around a tile: the exact receptive radius
    halo_error: float = 0.0  # where that is too large: tiles with this halo are within so much of the whole picture
    halo_why_none: str = ""  # why there is no tiling, where halo_px is None

    def __post_init__(self) -> None:
        if self.kind in ("transform", "burst") and self.halo_px is None and not self.halo_why_none:
            raise ConfigError(
                "spec.halo_px",
                None,
                "an image model states its halo or why it has none",
                "set halo_px (input pixels) or halo_why_none",
            )

    @property
    def fixed_px(self) -> tuple[int, int] | None:
        """(height, width) of the only pictures it takes, where its sides are fixed.

        With a halo, larger pictures are cut into windows of this size, and smaller ones padded to it by their borders'
        pixels, below and on the right; without one, other sizes are refused.
        """
        height, width = self.inputs[0].shape[-2:] if self.inputs and len(self.inputs[0].shape) >= 4 else ("h", "w")
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a model comes from. URIs may be gone one day; digests stay."""

    recipe: str = ""  # "module:function" and the overrides, as they were run
    recipe_digest: str = ""
    manifest: str = ""  # URI of the training manifest
    manifest_digest: str = ""
    code_version: str = ""
    run_id: str = ""  # MLflow run of the training
    images_seen: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """All a replica needs to serve `model.onnx` without importing the family that made it."""

    family: str
    spec: Spec
    licence: str
    classes: tuple[str, ...] = ()
    lineage: Lineage = field(default_factory=Lineage)
    parity_max_abs: float | None = None  # max |ONNX Runtime - torch|; of an imported network, - ONNX's reference
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Quality of one image -> image function on one suite. Per-image values are kept: gates compare pairs."""

    subject: str  # what was scored: an artifact's digest, or a baseline's name ("bicubic")
    suite: str  # which pictures, degraded how: a digest, so that unlike things are never compared
    keys: tuple[str, ...]  # one per image, in order
    metrics: Mapping[str, tuple[float, ...]]  # metric -> one value per key; higher is better
    provider: str = ""  # execution provider that computed it
    schema: int = SCHEMA

    def mean(self, metric: str) -> float:
        """Mean over the images, NaN for an empty suite."""
        values = self.metrics[metric]
        return sum(values) / len(values) if values else float("nan")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs where it was measured, in rounds that it took turns in with what it is compared to."""

    subject: str  # an artifact's digest
    hardware: str  # execution provider, processor, number of CPUs: figures of unlike ones are never compared
    ms_per_megapixel: tuple[float, ...]  # a round each: CPU time of all threads; on a GPU wall time
    memory_mib: float | None  # that its session holds once it ran: weights and working memory; None: not known there
    schema: int = SCHEMA


def to_json(value: Any) -> Any:
    """A frozen dataclass (nested, with tuples and mappings) as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def dumps(value: Any) -> str:
    """Canonical JSON: sorted keys, two spaces, a final newline. Equal values give equal bytes."""
    return json.dumps(to_json(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()


@functools.cache
def code_version() -> str:
    """The package's version and a digest of its sources: an edited checkout is told from a released one."""
    root = Path(__file__).parent
    files = {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(root.rglob("*.py"))}
    return f"{__version__}+{digest(files)[:12]}"


def loads(cls: type[T], text: str | bytes, what: str) -> T:
    """Read one document back. `what` names it in errors.

    Raises: ConfigError for broken JSON, a newer schema, unknown or missing fields, wrong types.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(what, str(error), "must be valid JSON", "restore it from its source") from None
    if isinstance(data, dict) and isinstance(data.get("schema"), int) and data["schema"] > SCHEMA:
        raise ConfigError(
            f"{what}.schema", data["schema"], f"this version reads up to schema {SCHEMA}", "upgrade rayscale"
        )
    return typing.cast(T, _read(cls, data, what))


def _read(kind: Any, data: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_dataclass(kind, data, path)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _read(option, data, path)
            except ConfigError:
                continue
    elif origin is Literal:
        if data in args:
            return data
    elif origin is tuple and isinstance(data, list):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_read(args[0], v, f"{path}[{i}]") for i, v in enumerate(data))
        if len(args) == len(data):
            return tuple(_read(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))
    elif origin is not None and issubclass(origin, Mapping) and isinstance(data, dict):
        return {k: _read(args[1], v, f"{path}.{k}") for k, v in data.items()}
    elif kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    elif kind is Any or (type(data) is kind) or (kind is type(None) and data is None):
        return data
    raise ConfigError(path, data, f"must be {getattr(kind, '__name__', kind)}", "correct the document")


def _read_dataclass(cls: type, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(path, data, f"must be an object with the fields of {cls.__name__}", "correct the document")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name not in known:
            raise ConfigError(f"{path}.{name}", data[name], f"{cls.__name__} has no such field", nearest(name, known))
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f"{path}.{name}", "(missing)", f"{cls.__name__} needs it", "correct the document")
    return cls(**{k: _read(hints[k], v, f"{path}.{k}") for k, v in data.items()})
