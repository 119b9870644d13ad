"""An artifact is a folder that is a model: `model.onnx`, `golden.npz`, `card.json`. The home of onnxruntime.

The folder appears under its name in one rename, with the card written last: a half-written artifact does not
exist. Its digest is the SHA-256 of the canonical JSON of {file: SHA-256}, and the bytes that were hashed are the
bytes that run. The golden probe is an input with its output: a flipped bit that ONNX Runtime would load without
complaint, or a device that computes something else, is found before the first request.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import math
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from rayscale import contract
from rayscale.contract import ModelCard, TensorSpec
from rayscale.errors import (
    ConfigError,
    ConflictError,
    IntegrityError,
    MissingError,
    ResourceError,
    UnavailableError,
)
from rayscale.observe import log
from rayscale.storage import TEMPORARY, check_free, os_errors

F32 = NDArray[np.float32]
Device = Literal["cpu", "cuda", "auto"]

MODEL, GOLDEN, CARD = "model.onnx", "golden.npz", "card.json"
FILES = (MODEL, GOLDEN, CARD)  # in the order they are written and uploaded: the card is last

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
GOLDEN_TOLERANCE = {CPU: 1e-4, CUDA: 1.0 / 255.0}  # max |output - golden|: other CPU types, other devices
CUDA_OPTIONS = {
    "use_tf32": "0",  # float32 is promised
    "cudnn_conv_algo_search": "HEURISTIC",  # an exhaustive search costs seconds for every new shape
}

ort.set_default_logger_severity(3)  # errors only: warnings about missing GPUs are not for users of CPUs


class Abort:
    """Ends a `Session.run` from another thread. One per call; the session stays usable."""

    def __init__(self) -> None:
        self.options = ort.RunOptions()

    def now(self) -> None:
        self.options.terminate = True


class Session:
    """A verified model, ready to run. Made by `load`.

    `run` may be called from several threads at once: ONNX Runtime releases the GIL and the calls share one
    pool of threads, so more callers do not mean more speed. A session is bound to its process: load it where it
    runs, do not send it.
    """

    def __init__(self, session: Any, card: ModelCard, digest: str) -> None:
        self._session = session
        self.card = card
        self.digest = digest
        self.provider: str = session.get_providers()[0]
        self._outputs = [t.name for t in card.spec.outputs]

    def run(self, inputs: Mapping[str, F32], abort: Abort | None = None) -> dict[str, F32]:
        """All outputs for all inputs, by the card's names. Values are taken as they are, shapes are checked.

        Raises: ConfigError for inputs unlike the card's; UnavailableError when `abort.now()` was called.
        """
        bind(self.card, {name: value.shape for name, value in inputs.items()})
        for name, value in inputs.items():
            if value.dtype != np.float32:
                raise ConfigError(name, value.dtype, "must be float32", "convert it, e.g. imaging.to_nchw_f32")
        try:
            found = self._session.run(self._outputs, dict(inputs), abort.options if abort else None)
        except Exception:  # ONNX Runtime's classes share no base of their own
            if abort is not None and abort.options.terminate:
                raise UnavailableError("run", self.digest[:12], "was aborted by its owner", "ask again") from None
            raise
        return dict(zip(self._outputs, found, strict=True))

    def transform(self, nchw: F32) -> F32:
        """One image in, one image out: f32[n, c, h, w] in [0, 1]. Pads nothing: sides are multiples of align.

        Raises: ConfigError where the model is no function of one image, and as `run`.
        """
        spec = self.card.spec
        if spec.kind != "transform" or len(spec.inputs) != 1:
            shown = f"{spec.kind} of {len(spec.inputs)} inputs"
            raise ConfigError("card.spec.kind", shown, "is no transform of one image", "use Session.run")
        return self.run({spec.inputs[0].name: nchw})[self._outputs[0]]


def load(
    folder: str | Path,
    *,
    expect_digest: str | None = None,
    device: Device = "cpu",
    threads: int = 0,
    check_golden: bool = True,
) -> Session:
    """Open an artifact: verify the digest, start ONNX Runtime, run the golden probe.

    `threads` 0 takes the CPUs of this process (its affinity; a container's quota is the caller's to pass).
    `device="auto"` takes CUDA where it really starts: `Session.provider` says which it took.

    Raises: MissingError without an artifact; IntegrityError for a wrong digest, a damaged file or a failed
    probe; ConfigError for a newer card schema or a card unlike its model; ResourceError for a CUDA that was
    asked for and does not start.
    """
    folder = Path(folder)
    files = {name: _read(folder, name) for name in FILES}
    digest = _digest(files)
    if expect_digest is not None and digest != expect_digest:
        raise IntegrityError(f"digest of {folder} ({', '.join(FILES)})", digest, f"expected {expect_digest}",
                             "these are not the files that were published: fetch them again")  # fmt: skip
    card = contract.loads(ModelCard, files[CARD], CARD)
    session = open_model(files[MODEL], card, device=device, threads=threads, digest=digest)
    if check_golden:
        _check_golden(session, files[GOLDEN])
    return session


def open_model(model: bytes, card: ModelCard, *, device: Device = "cpu", threads: int = 0, digest: str = "") -> Session:
    """A session over model bytes that are no artifact yet (export, import). `load` is for all others.

    Raises: IntegrityError for bytes that are no model; ConfigError, ResourceError as `load`.
    """
    started = _start(model, device, threads or _cpus())
    _check_boundary("inputs", card.spec.inputs, started.get_inputs())
    _check_boundary("outputs", card.spec.outputs, started.get_outputs())
    return Session(started, card, digest)


def write(folder: str | Path, model: bytes | Path, card: ModelCard, golden_input: Mapping[str, F32]) -> str:
    """Make an artifact of a model and its card, and return its digest. The probe's output is computed here.

    Writing an equal artifact again changes nothing.

    Raises: ConflictError when another one is there; ResourceError for a full disk; MissingError where nothing may
    be written; ConfigError, IntegrityError as `open_model`.
    """
    folder = Path(folder)
    data = model if isinstance(model, bytes) else model.read_bytes()
    outputs = open_model(data, card).run(golden_input)
    for name, value in outputs.items():
        if not np.isfinite(value).all():
            raise IntegrityError(name, "NaN or infinite", "the golden output must be finite", "train it again")
    files = {MODEL: data, GOLDEN: _pack_golden(golden_input, outputs), CARD: contract.dumps(card).encode()}
    digest = _digest(files)
    check_free(folder, sum(map(len, files.values())), f"artifact {folder.name}")
    partial = folder.parent / f"{TEMPORARY}{folder.name}-{uuid.uuid4().hex[:12]}"
    try:
        with os_errors(folder):
            partial.mkdir(parents=True)
            for name in FILES:
                with (partial / name).open("wb") as file:
                    file.write(files[name])
                    file.flush()
                    os.fsync(file.fileno())
        try:
            partial.rename(folder)  # over nothing, or over an empty folder
        except OSError:
            if not (folder / CARD).is_file() or digest_of(folder) != digest:
                remedy = "remove it or name another folder"
                raise ConflictError("artifact", folder, "something else is there already", remedy) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digest


class Boundary(NamedTuple):
    """What a model file says of one of its tensors; an axis that is free is None."""

    name: str
    type: str  # ONNX Runtime's, e.g. "tensor(float)"
    shape: tuple[int | None, ...]


def boundary(model: bytes) -> tuple[list[Boundary], list[Boundary]]:
    """Inputs and outputs of model bytes that have no card yet. Raises: IntegrityError."""
    started = _open(model, 1, [CPU])
    sides = (started.get_inputs(), started.get_outputs())
    inputs, outputs = (
        [Boundary(t.name, t.type, tuple(a if isinstance(a, int) else None for a in t.shape)) for t in side]
        for side in sides
    )
    return inputs, outputs


def digest_of(folder: str | Path) -> str:
    """The artifact's digest, from its files. Raises: MissingError, IntegrityError (a file is not there)."""
    return _digest({name: _read(Path(folder), name) for name in FILES})


def bind(card: ModelCard, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The sizes of the free axes ("n", "h", "w") that these input shapes stand for.

    Raises: ConfigError naming the input and the rule it breaks.
    """
    spec = card.spec
    if set(shapes) != {t.name for t in spec.inputs}:
        wanted = ", ".join(t.name for t in spec.inputs)
        raise ConfigError("inputs", ", ".join(sorted(shapes)), f"the model takes {wanted}", "name them so")
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        shape = tuple(shapes[tensor.name])
        shown = f"{tensor.name} {shape}"
        if len(shape) != len(tensor.shape):
            raise ConfigError(shown, f"{len(shape)} axes", f"must be {tensor.shape}", "reshape it")
        for position, (size, axis) in enumerate(zip(shape, tensor.shape, strict=True)):
            factor, name = axis_of(axis)
            if not name:
                if size != factor:
                    raise ConfigError(shown, size, f"axis {position} must be {factor}", "reshape it")
                continue
            multiple = math.lcm(factor, side_multiple(card, tensor, position))
            if size < 1 or size % multiple:
                raise ConfigError(shown, size, f"axis {position} must be a multiple of {multiple}",
                                  "pad it (imaging.run_tiled does)")  # fmt: skip
            if sizes.setdefault(name, size // factor) != size // factor:
                rule = f"axis {position} must be {factor * sizes[name]}: {name} is {sizes[name]} elsewhere"
                raise ConfigError(shown, size, rule, "give inputs of one size")
    return sizes


@functools.cache
def axis_of(axis: int | str) -> tuple[int, str]:
    """An axis of a TensorSpec as (factor, free name): "2*h" -> (2, "h"), "n" -> (1, "n"), 3 -> (3, "")."""
    if isinstance(axis, int):
        return axis, ""
    factor, star, name = axis.rpartition("*")
    if not name.isidentifier() or (star and not factor.isdigit()) or (star and int(factor) < 1):
        raise ConfigError("spec axis", axis, 'must be a number, a name or "k*name"', 'write e.g. "2*h"')
    return int(factor or 1), name


def side_multiple(card: ModelCard, tensor: TensorSpec, position: int) -> int:
    """What an axis must be a multiple of, its own factor apart: align for a picture's sides, else 1."""
    is_side = len(tensor.shape) >= 4 and position >= len(tensor.shape) - 2
    return card.spec.align if is_side else 1


def _start(model: bytes, device: Device, threads: int) -> Any:
    if device not in ("cpu", "cuda", "auto"):
        raise ConfigError("device", device, "must be cpu, cuda or auto", "choose one of them")
    if device == "cpu" or (device == "auto" and not _has_cuda_driver()):
        return _open(model, threads, [CPU])
    with contextlib.redirect_stdout(io.StringIO()) as notes:  # it prints what it cannot find
        ort.preload_dlls(directory="")  # of the nvidia-* wheels; here and not at import: CPU users never pay
    ort.set_default_logger_severity(4)  # the failure is reported below, in one line
    try:
        session = _open(model, threads, [(CUDA, CUDA_OPTIONS), CPU])
        reason = notes.getvalue().partition("\n")[0] or "onnxruntime fell back to the CPU"
    except IntegrityError as error:  # a driver without a device fails here, a broken model on the CPU too
        session, reason = _open(model, threads, [CPU]), str(error.value)
    finally:
        ort.set_default_logger_severity(3)
    if session.get_providers()[0] == CUDA:
        return session
    if device == "cuda":
        remedy = "install an NVIDIA driver, and CUDA and cuDNN for onnxruntime-gpu; or use cpu"
        raise ResourceError("device", device, f"CUDA did not start: {reason}", remedy)
    log.warning("device=auto: CUDA did not start (%s), using the CPU", reason)
    return session


def _open(model: bytes, threads: int, providers: list[Any]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Waiting threads that spin halve the throughput of every process beside this one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's classes share no base of their own
        rule = f"ONNX Runtime {ort.__version__} needs one whole ONNX file, its weights inside"
        raise IntegrityError(MODEL, error, rule, "fetch or export it again") from None


def _has_cuda_driver() -> bool:
    if CUDA not in ort.get_available_providers():
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_boundary(side: str, declared: Sequence[TensorSpec], actual: Sequence[Any]) -> None:
    """The card's tensors are the model's: names, float32, ranks; nothing fixed that the card calls free."""
    field = f"card.spec.{side}"
    if {t.name for t in declared} != {a.name for a in actual}:
        names = ", ".join(a.name for a in actual)
        raise ConfigError(field, ", ".join(t.name for t in declared), f"{MODEL} has {names}", "correct the card")
    by_name = {a.name: a for a in actual}
    for tensor in declared:
        found = by_name[tensor.name]
        if found.type != "tensor(float)":
            raise ConfigError(f"{field}.{tensor.name}", found.type, "must be float32", "export it as float32")
        if not found.shape:  # the model does not state it
            continue
        fits = len(found.shape) == len(tensor.shape) and all(
            not isinstance(size, int) or size == axis for size, axis in zip(found.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ConfigError(f"{field}.{tensor.name}", tensor.shape, f"{MODEL} has {found.shape}", "correct the card")


def _check_golden(session: Session, golden: bytes) -> None:
    try:
        with np.load(io.BytesIO(golden), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        inputs = {t.name: arrays[f"in/{t.name}"] for t in session.card.spec.inputs}
        expected = {t.name: arrays[f"out/{t.name}"] for t in session.card.spec.outputs}
        tolerance = float(arrays[f"tolerance/{session.provider}"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise IntegrityError(GOLDEN, error, "is damaged or of another model", "fetch the artifact again") from None
    for name, value in session.run(inputs).items():
        same = value.shape == expected[name].shape
        error_abs = float(np.abs(value - expected[name]).max()) if same else float("nan")
        if not error_abs <= tolerance:  # NaN fails too
            shown = f"off by {error_abs:.3g}" if same else f"shape {value.shape}"
            rule = f"must be within {tolerance:.3g} of {GOLDEN} on {session.provider}"
            raise IntegrityError(f"{MODEL} output {name}", shown, rule, "fetch the artifact again")


def _pack_golden(inputs: Mapping[str, F32], outputs: Mapping[str, F32]) -> bytes:
    arrays: dict[str, Any] = {f"in/{k}": v for k, v in inputs.items()}
    arrays |= {f"out/{k}": v for k, v in outputs.items()}
    arrays |= {f"tolerance/{k}": np.float64(v) for k, v in GOLDEN_TOLERANCE.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # carries no time: equal arrays give equal bytes
    return buffer.getvalue()


def _digest(files: Mapping[str, bytes]) -> str:
    return contract.digest({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not (folder / CARD).is_file():
            raise MissingError("artifact", folder, f"has no {CARD}", "name the folder of an exported model") from None
        raise IntegrityError(
            str(folder / name), "(missing)", "is part of the artifact", "fetch the artifact again"
        ) from None
