"""torch -> ONNX -> artifact, and the proof that both say the same.

Nothing is written before every check passed: parity on many shapes, a batch equals its samples, outputs have the
card's shapes and range, tiles stitched with the card's halo equal the whole picture.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from rayscale import artifact, halo
from rayscale.artifact import Session, axis_of, side_multiple
from rayscale.contract import ModelCard, TensorSpec
from rayscale.errors import ConfigError, ParityError, RayscaleError

F32 = NDArray[np.float32]

OPSET = 20
PARITY_MAX_ABS = 1e-4
MAX_MODEL_BYTES = 2**31 - 2**20  # one protobuf file ends at 2 GiB

# Free axes of the probes, in units of their smallest step: one pixel, lines, odd, even, larger than most kernels.
PROBE_SIDES = ((1, 1), (1, 7), (6, 1), (2, 3), (16, 16), (17, 23), (41, 32))
PROBE_BATCHES = (1, 3)
GOLDEN_SIDES = (16, 12)


def to_onnx(module: nn.Module, card: ModelCard, folder: str | Path) -> ModelCard:
    """Export what a task ships, check it, and write the artifact. Returns the card with `parity_max_abs` set.

    `module` takes the tensors of `card.spec.inputs` in their order and returns those of `outputs` (one tensor, or
    a tuple); it is left as it is. Equal weights and an equal card give an equal artifact.

    Raises: ParityError when a check fails, and then nothing is left behind; ConfigError for a card unlike the
    module; ConflictError when `folder` holds something else.
    """
    module = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    model = _export(module, card)
    session = artifact.open_model(model, card)
    probes = [_probe(card, sizes) for sizes in _probe_sizes(card)]
    card = dataclasses.replace(card, parity_max_abs=max(_check_probe(module, session, probe) for probe in probes))
    _check_halo(session)
    artifact.write(folder, model, card, _probe(card, _sizes(card, 1, *GOLDEN_SIDES)))
    return card


def _export(module: nn.Module, card: ModelCard) -> bytes:
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    if size > MAX_MODEL_BYTES:
        raise ConfigError("task", f"{size / 2**30:.1f} GiB of weights", "one ONNX file holds less than 2 GiB",
                          "use a smaller model")  # fmt: skip
    example = _probe(card, _sizes(card, 2, 5, 7))  # sizes 0 and 1 would be taken for constants
    steps = _steps(card)
    dims = {name: torch.export.Dim(name) for name in steps}
    dynamic = tuple(
        {
            position: factor * steps[name] * dims[name] if factor * steps[name] > 1 else dims[name]
            for position, (factor, name) in enumerate(map(axis_of, tensor.shape))
            if name
        }
        for tensor in card.spec.inputs
    )
    try:
        with _quiet(), torch.inference_mode():
            program = torch.onnx.export(
                module,
                tuple(torch.from_numpy(example[t.name]) for t in card.spec.inputs),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=[t.name for t in card.spec.inputs],
                output_names=[t.name for t in card.spec.outputs],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        rule = f"must export with {', '.join(steps)} free, sides in steps of {card.spec.align}"
        remedy = "raise spec.align, or take sizes from tensors and not from Python numbers"
        raise ConfigError("task", error.__cause__ or error, rule, remedy) from error
    assert program is not None
    # Stack traces with the paths of this machine: nobody else's business, and equal weights would differ in bytes.
    ClearMetadataAndDocStringPass()(program.model)
    return bytes(program.model_proto.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes (missing torchvision, deprecations of torch within torch) from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _steps(card: ModelCard) -> dict[str, int]:
    """The free axes of the inputs, first to last, and what each must be a multiple of so that align holds."""
    steps: dict[str, int] = {}
    for tensor in card.spec.inputs:
        for position, (factor, name) in enumerate(map(axis_of, tensor.shape)):
            if name:
                need = math.lcm(factor, side_multiple(card, tensor, position)) // factor
                steps[name] = math.lcm(steps.get(name, 1), need)
    for tensor in card.spec.outputs:
        for _, name in map(axis_of, tensor.shape):
            if name and name not in steps:
                raise ConfigError(f"card.spec.outputs.{tensor.name}", name, "is no axis of an input",
                                  f"use one of {', '.join(steps)}")  # fmt: skip
    return steps


def _sizes(card: ModelCard, batch: int, height: int, width: int) -> dict[str, int]:
    """Sizes for the free axes: the first is the batch, the last two of a picture its sides, others are 2."""
    steps = _steps(card)
    units = dict.fromkeys(steps, 2)
    for tensor in card.spec.inputs:
        names = [axis_of(axis)[1] for axis in tensor.shape]
        if len(names) >= 4:
            units |= {names[-2]: height, names[-1]: width}
        units[names[0]] = batch
    return {name: step * units[name] for name, step in steps.items()}


def _probe_sizes(card: ModelCard) -> list[dict[str, int]]:
    found = [_sizes(card, n, h, w) for h, w in PROBE_SIDES for n in PROBE_BATCHES]
    return [sizes for i, sizes in enumerate(found) if sizes not in found[:i]]  # fixed axes make equal ones


def _shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(factor * sizes[name] if name else factor for factor, name in map(axis_of, tensor.shape))


def _probe(card: ModelCard, sizes: Mapping[str, int]) -> dict[str, F32]:
    """Noise over the whole range of each input: every weight and every pixel counts. Always the same."""
    rng = np.random.default_rng(0)
    return {
        t.name: (t.low + (t.high - t.low) * rng.random(_shape(t, sizes))).astype(np.float32) for t in card.spec.inputs
    }


def _check_probe(module: nn.Module, session: Session, probe: Mapping[str, F32]) -> float:
    """max |ONNX Runtime - torch| on one probe, after all that the card promises held on it."""
    card, at = session.card, ", ".join(f"{name} {value.shape}" for name, value in probe.items())
    sizes = artifact.bind(card, {name: value.shape for name, value in probe.items()})
    expected = _run_torch(module, card, probe, at)
    actual = _run_onnx(session, probe, at)
    worst = 0.0
    for tensor in card.spec.outputs:
        want, got = expected[tensor.name], actual[tensor.name]
        field, shape = f"{tensor.name} at {at}", _shape(tensor, sizes)
        if not want.shape == got.shape == shape:
            raise ParityError(
                field, f"torch {want.shape}, onnx {got.shape}", f"the card says {shape}", "correct the spec"
            )
        error = float(np.abs(got - want).max())
        if not error <= PARITY_MAX_ABS:  # NaN fails too
            raise ParityError(field, error, f"ONNX Runtime must be within {PARITY_MAX_ABS:g} of torch",
                              "find the operator that differs; NaN: the weights are broken")  # fmt: skip
        if not (tensor.low <= got.min() and got.max() <= tensor.high):
            raise ParityError(field, f"[{got.min():g}, {got.max():g}]", f"the card says [{tensor.low:g}, "
                              f"{tensor.high:g}]", "clamp the output, or correct the spec")  # fmt: skip
        worst = max(worst, error)
    _check_batch(session, probe, actual, at)
    return worst


def _check_batch(session: Session, probe: Mapping[str, F32], whole: Mapping[str, F32], at: str) -> None:
    """Tiles of many users share a batch: what a sample gives must not depend on its neighbours, to the bit."""
    count = len(next(iter(probe.values())))
    for i in range(count if count > 1 else 0):
        alone = _run_onnx(session, {name: value[i : i + 1] for name, value in probe.items()}, at)
        for name, value in alone.items():
            if not np.array_equal(value, whole[name][i : i + 1]):
                error = np.abs(value - whole[name][i : i + 1]).max()
                remedy = "write a mean over channels as a 1x1 convolution or an NHWC LayerNorm"
                raise ParityError(f"{name} at {at}", error, f"sample {i} must not depend on its batch", remedy)


def _check_halo(session: Session) -> None:
    """Tiles with the card's halo, stitched, equal the whole picture: along both sides of long strips.

    To the bit, unless the card states by how much they may differ.
    """
    spec = session.card.spec
    error = halo.error_of(session.run, spec)
    if not error <= spec.halo_error:
        rule = f"stitched tiles differ from the whole by {error:.3g}, the card allows {spec.halo_error:.3g}"
        remedy = "state the exact receptive radius, a larger halo, or halo_px=None and halo_why_none"
        raise ParityError("spec.halo_px", spec.halo_px, rule, remedy)


def _run_torch(module: nn.Module, card: ModelCard, probe: Mapping[str, F32], at: str) -> dict[str, F32]:
    try:
        with torch.inference_mode():
            found = module(*(torch.from_numpy(probe[t.name]) for t in card.spec.inputs))
    except RuntimeError as error:
        raise ParityError(at, error, "the module must take every size the card allows", "raise spec.align") from error
    outputs = found if isinstance(found, tuple | list) else (found,)
    if len(outputs) != len(card.spec.outputs):
        raise ConfigError("card.spec.outputs", len(card.spec.outputs), f"the module returns {len(outputs)}", "name all")
    return {t.name: value.numpy() for t, value in zip(card.spec.outputs, outputs, strict=True)}


def _run_onnx(session: Session, probe: Mapping[str, F32], at: str) -> dict[str, F32]:
    try:
        return session.run(probe)
    except RayscaleError:
        raise
    except Exception as error:  # ONNX Runtime's classes share no base of their own
        raise ParityError(at, error, "ONNX Runtime cannot run this size", "a size was taken for a constant") from error
