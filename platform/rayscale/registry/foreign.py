"""An ONNX network made elsewhere as an artifact: what its card says is measured on the network itself.

A picture network takes one f32[n, 3, h, w] in [0, 1] and gives one, `scale` times as large; its sides may be fixed.
One of luma, f32[n, 1, h, w], is made one of RGB first. What else there is (masks, bursts, noise) is taken as a card
declares it; its boundary and its halo are checked all the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rayscale import artifact, halo
from rayscale.artifact import Abort, Boundary, axis_of, side_multiple
from rayscale.contract import ModelCard, Spec, TensorSpec
from rayscale.errors import ConfigError, ParityError
from rayscale.imaging import F32
from rayscale.observe import log
from rayscale.registry import luma

ALIGNS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)  # pixels; tried in this order
_SIDE_PX = 48  # of probes, about: larger than most kernels
_BOUNDS = (-0.5, 1.5)  # a network without a clamp leaves [0, 1] by less, on a plain picture
_WRAP = "wrap the network so that it does, and export that"


def adapted(model: bytes) -> bytes:
    """The network as one of RGB pictures: as it is, or around it what a network of luma needs.

    Raises: ConfigError, IntegrityError, as `probed`.
    """
    inputs, outputs = artifact.boundary(model)
    if not _is_luma(inputs, outputs):
        return model
    given, made = _picture("input", inputs, 1), _picture("output", outputs, 1)
    run, fixed = _opened(model, given, made), _fixed_sides(given)

    def grey(nchw: F32) -> F32:
        return np.repeat(run(nchw[:, :1]), 3, axis=1)

    align, scale = (1, _scale_at(grey, [fixed])) if fixed else _align_and_scale(grey)
    _check_range(grey, fixed or (align * 12, align * 16))
    log.info("a network of luma, x%d: colours are enlarged bicubically around it", scale)
    return luma.as_rgb(model, scale)


def probed(model: bytes, *, halo_px: int | None = None, why_untiled: str = "") -> Spec:
    """The spec of a picture network, from its bytes alone.

    halo_px: as its maker declares it, which is checked; None: measured. why_untiled: do not tile it, for this reason.

    Raises: ConfigError where it is no such network, with what it is; ParityError for a halo that is too small;
    IntegrityError for bytes that are no model.
    """
    inputs, outputs = artifact.boundary(model)
    given, made = _picture("input", inputs), _picture("output", outputs)
    fixed = _fixed_sides(given)
    run = _opened(model, given, made)
    align, scale = (1, _scale_at(run, [fixed])) if fixed else _align_and_scale(run)
    batch: int | str = "n" if given.shape[0] is None and _batch_is_exact(run, fixed or (align * 9, align * 8)) else 1
    _warn_of_small(run, fixed or (align, align))
    _check_range(run, fixed or (align * 12, align * 16))
    sides: tuple[int | str, int | str] = fixed or ("h", "w")
    larger = [side * scale if isinstance(side, int) else f"{scale}*{side}" if scale > 1 else side for side in sides]
    spec = Spec(
        kind="transform",
        inputs=(TensorSpec(name=given.name, shape=(batch, 3, *sides)),),
        outputs=(TensorSpec(name=made.name, shape=(batch, 3, *larger)),),
        scale=scale,
        align=align,
        halo_why_none=why_untiled or "not measured",
    )
    if not fixed:
        _check_output_axes(made)
    return spec if why_untiled else _with_halo(run, spec, halo_px)


def parity(model: bytes, spec: Spec) -> float | None:
    """max |ONNX Runtime - ONNX's own reference implementation| on noise; None where that cannot run it."""
    from onnx.reference import ReferenceEvaluator

    card = ModelCard(family="", spec=spec, licence="")
    given = probe(card, about_px=16)
    try:
        named = [t.name for t in spec.outputs]
        reference = dict(zip(named, ReferenceEvaluator(model).run(named, given), strict=True))
    except Exception as error:  # an operator that it does not know; it raises anything
        log.warning("ONNX's reference implementation cannot run it, the gate will miss its parity: %s", error)
        return None
    made = artifact.open_model(model, card).run(given)
    return max(float(np.abs(made[name] - reference[name]).max()) for name in named)


def checked(model: bytes, spec: Spec) -> None:
    """A declared spec's halo, where it has one, held against the network. Raises: ParityError."""
    error = halo.error_of(artifact.open_model(model, ModelCard(family="", spec=spec, licence="")).run, spec)
    if not error <= spec.halo_error:
        raise ParityError("halo_px", spec.halo_px, f"tiles differ from the whole by {error:.3g}, "
                          f"the card allows {spec.halo_error:.3g}", "declare a larger one")  # fmt: skip


def write(folder: Path, model: bytes, card: ModelCard) -> str:
    """The artifact, its golden probe noise; its digest. Raises: as `artifact.write`."""
    return artifact.write(folder, model, card, probe(card, about_px=_SIDE_PX))


def probe(card: ModelCard, about_px: int, batch: int = 1) -> dict[str, F32]:
    """Noise over the whole range of each input, `batch` samples where it may be chosen, the sides of pictures about
    so long and unlike."""
    about = {"n": batch, "h": about_px + 8, "w": about_px}
    rng = np.random.default_rng(0)
    found = {}
    for tensor in card.spec.inputs:
        shape = []
        for position, axis in enumerate(tensor.shape):
            factor, name = axis_of(axis)
            step = math.lcm(factor, side_multiple(card, tensor, position))
            shape.append(-(-about.get(name, 2) // step) * step if name else factor)
        found[tensor.name] = (tensor.low + (tensor.high - tensor.low) * rng.random(shape)).astype(np.float32)
    return found


# --- the boundary -----------------------------------------------------------------------------------------------


def _is_luma(inputs: Sequence[Boundary], outputs: Sequence[Boundary]) -> bool:
    """One picture of one channel in and, if that is stated, out."""
    channels = [t.shape[1] for t in (*inputs, *outputs) if len(t.shape) == 4]
    return len(inputs) == len(outputs) == 1 and channels in ([1, 1], [1, None])


def _picture(side: str, tensors: Sequence[Boundary], wanted: int = 3) -> Boundary:
    """The one tensor of a side. Raises: ConfigError where it is no picture of `wanted` channels, NCHW float32."""
    shown = ", ".join(f"{t.name} {_shown(t)}" for t in tensors)
    if len(tensors) != 1:
        remedy = "declare it with --card, if it is a burst or inpainting; or " + _WRAP
        raise ConfigError(
            f"model {side}s", shown, f"a function of pictures has one {side}, this one {len(tensors)}", remedy
        )
    (tensor,) = tensors
    field = f"model {side}"
    if tensor.type != "tensor(float)":
        raise ConfigError(field, f"{shown} {tensor.type}", "must be float32", _WRAP)
    if len(tensor.shape) != 4:
        rule = "is no picture, which is [n, 3, h, w]: this is no function from a picture to a picture"
        raise ConfigError(field, shown, rule, "declare what else it is (embed, generate, burst) with --card")
    batch, channels = tensor.shape[:2]
    if channels != wanted and tensor.shape[3] in (1, 3):
        raise ConfigError(field, shown, "has its channels last (NHWC): it must be [n, 3, h, w]", _WRAP)
    if channels not in (wanted, None):
        rule = f"has {channels} channels: both sides must be [n, 3, h, w], RGB, or [n, 1, h, w], luma"
        raise ConfigError(field, shown, rule, _WRAP)
    if batch not in (1, None):
        raise ConfigError(field, shown, f"its batch is fixed at {batch}", "export it with a free batch, or with 1")
    return tensor


def _shown(tensor: Boundary) -> str:
    return "[" + ", ".join("?" if axis is None else str(axis) for axis in tensor.shape) + "]"


def _fixed_sides(given: Boundary) -> tuple[int, int] | None:
    height, width = given.shape[2:]
    if height is None and width is None:
        return None
    if height is None or width is None:
        raise ConfigError("model input", _shown(given), "one side is fixed, the other free", "fix or free both")
    return height, width


def _check_output_axes(made: Boundary) -> None:
    if any(axis is not None for axis in made.shape[2:]):
        rule = "the output's sides are stated as fixed, the input's are free"
        raise ConfigError("model output", _shown(made), rule, "name them in dynamic_axes or dynamic_shapes as well")


def _any_size(tensor: Boundary) -> TensorSpec:
    names = ("n", "c", "h", "w")
    axes = [names[i] if axis is None else axis for i, axis in enumerate(tensor.shape)]
    return TensorSpec(name=tensor.name, shape=tuple(axes))


# --- probes -----------------------------------------------------------------------------------------------------


def _opened(model: bytes, given: Boundary, made: Boundary) -> Callable[[F32], F32]:
    """The network as a function; sizes that it cannot take are expected here, ONNX Runtime shall not print them."""
    spec = Spec(kind="transform", inputs=(_any_size(given),), outputs=(_any_size(made),), halo_why_none="probe")
    session = artifact.open_model(model, ModelCard(family="", spec=spec, licence=""))

    def run(nchw: F32) -> F32:
        abort = Abort()
        abort.options.log_severity_level = 4
        return session.run({given.name: nchw}, abort)[made.name]

    return run


def _noise(height: int, width: int, batch: int = 1) -> F32:
    return np.random.default_rng(0).random((batch, 3, height, width)).astype(np.float32)


def _align_and_scale(run: Callable[[F32], F32]) -> tuple[int, int]:
    """The smallest step of sides that the network takes, and its scale. Raises: ConfigError with what came back."""
    first: ConfigError | None = None
    for align in ALIGNS:
        least = -(-_SIDE_PX // align)
        try:
            return align, _scale_at(run, [(align * (least + i), align * (least + 1 - i)) for i in range(2)])
        except ConfigError as error:
            first = first or error
    assert first is not None
    raise first


def _scale_at(run: Callable[[F32], F32], sides: Sequence[tuple[int, int]]) -> int:
    """Its scale, which all of these sizes agree on. Raises: ConfigError."""
    scales = set()
    for height, width in sides:
        field = f"model at {width}x{height} px"
        try:
            shape = run(_noise(height, width)).shape
        except Exception as error:  # ONNX Runtime's classes share no base of their own
            why = str(error).strip().rpartition("\n")[2]
            raise ConfigError(field, why, "does not run on a picture of this size",
                              f"sides may be fixed, or in steps of up to {ALIGNS[-1]} px") from None  # fmt: skip
        factor = max(1, shape[-1] // width) if shape else 1
        if shape != (1, 3, height * factor, width * factor):
            rule = "must give a picture a whole number of times as large, its borders padded by itself"
            raise ConfigError(field, f"gave {list(shape)}", rule, _WRAP)
        scales.add(factor)
    if len(scales) > 1:
        raise ConfigError("model", sorted(scales), "its scale depends on the picture's size", _WRAP)
    return scales.pop()


def _batch_is_exact(run: Callable[[F32], F32], sides: tuple[int, int]) -> bool:
    """Does a picture of a batch come out as it does alone, to the bit? Else it is served one at a time."""
    pictures = _noise(*sides, batch=3)
    try:
        together = run(pictures)
        exact = all(np.array_equal(together[i : i + 1], run(pictures[i : i + 1])) for i in range(3))
    except Exception as error:  # a batch that was traced as a constant
        log.warning("the network takes one picture at a time: %s", str(error).strip().partition("\n")[0])
        return False
    if not exact:
        log.warning("a picture's result depends on its batch: the network will be given one at a time")
    return exact


def _warn_of_small(run: Callable[[F32], F32], sides: tuple[int, int]) -> None:
    try:
        run(_noise(*sides))
    except Exception as error:  # a reflected border is wider than the picture
        why = str(error).strip().rpartition("\n")[2]
        log.warning("it cannot take the smallest pictures, %dx%d px: %s", *sides, why)


def _check_range(run: Callable[[F32], F32], sides: tuple[int, int]) -> None:
    """A smooth picture in [0, 1] must give one in about [0, 1]. Raises: ConfigError, e.g. for one in 0..255."""
    rows, columns = (np.linspace(0.1, 0.9, side, dtype=np.float32) for side in sides)
    smooth = np.broadcast_to((rows[:, None] + columns[None]) / 2, (1, 3, *sides))
    made = run(np.ascontiguousarray(smooth))
    low, high = float(made.min()), float(made.max())
    if not (_BOUNDS[0] <= low and high <= _BOUNDS[1]):  # NaN fails too
        rule = "a smooth picture in [0, 1] must give one in [0, 1]"
        raise ConfigError("model output", f"[{low:.3g}, {high:.3g}]", rule, "divide and multiply inside the network")
    if low < 0.0 or high > 1.0:
        log.warning("its output is not clamped ([%.3g, %.3g] on a smooth picture): 8-bit pictures are, at the end",
                    low, high)  # fmt: skip


# --- the halo ---------------------------------------------------------------------------------------------------


def _with_halo(run: Callable[[F32], F32], spec: Spec, declared: int | None) -> Spec:
    """`spec` with the halo that tiles exactly, coarser aligned where that is needed, or why there is none."""
    fixed, scale = spec.fixed_px, spec.scale

    def reach(align: int) -> int | None:
        return halo.reach(run, 3, scale=scale, align=align, short_px=_SIDE_PX, fixed_px=fixed)

    def error_of(halo_px: int, align: int) -> float:
        if fixed is not None:
            return halo.shifted_error(run, 3, fixed, scale=scale, halo_px=halo_px, align=align)
        return halo.stitched_error(run, 3, scale=scale, halo_px=halo_px, align=align, short_px=_SIDE_PX)

    if declared is not None:
        error = error_of(declared, spec.align)
        if error != 0.0:
            seen = reach(spec.align)
            remedy = "leave --halo out" if seen is None else f"it was measured to see {seen} px far: leave --halo out"
            raise ParityError("--halo", declared, f"tiles differ from the whole by {error:.3g}", remedy)
        return dataclasses.replace(spec, halo_px=declared, halo_why_none="")
    errors = []
    for align in _grids(spec):
        seen = reach(align)
        if seen is None:
            far = halo.LONGEST_PX // 4 if fixed is None else min(fixed) // 4
            why = f"an output pixel sees further than {far} px, perhaps the whole picture (measured)"
            return dataclasses.replace(spec, halo_why_none=why)
        error = error_of(seen, align)
        if error == 0.0:
            return dataclasses.replace(spec, align=align, halo_px=seen, halo_why_none="")
        errors.append(error)
    why = f"no halo makes tiles exact: what a pixel gives depends on its place (off by {min(errors):.3g}, measured)"
    return dataclasses.replace(spec, halo_why_none=why)


def _grids(spec: Spec) -> Iterator[int]:
    """Steps of tiles to try: the grid of a network that pads itself, or takes one size, does not show in its sizes."""
    if spec.fixed_px is not None:
        yield from (align for align in ALIGNS if not any(side % align for side in spec.fixed_px))
        return
    align = spec.align
    while align <= ALIGNS[-1]:
        yield align
        align *= 2
