"""What models cost where they run: time a megapixel and the memory of a session, side by side in one process."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rayscale import artifact
from rayscale.artifact import CPU, Device, Session
from rayscale.contract import Cost
from rayscale.imaging import F32
from rayscale.registry.foreign import probe

SIDE_PX = 128  # of the picture, about: a tile
BATCH = 8  # where sides are fixed: such pictures are small
ROUNDS, LEAST_ROUNDS, BUDGET_S = 7, 3, 20.0  # fewer for large models
TRIES = 3  # to measure memory
ROUND_S = 0.005  # a round of a small model is several runs


class _Ready(NamedTuple):
    session: Session
    given: Mapping[str, F32]
    megapixels: float  # of what it takes; of what it makes, where that is from no picture
    repeats: int
    memory_mib: float | None


def measure(folders: Mapping[str, Path], device: Device = "cpu") -> dict[str, Cost]:
    """The costs of artifacts by name, on noise: each is opened anew, run once, then all take turns.

    Time is CPU time of all threads (wall time on a GPU): what else the machine does hardly shows, and the rounds are
    paired. Memory is what a session holds after its first run, its arena included, which never shrinks.
    Raises: as `artifact.load`.
    """
    ready = {name: _plausible(folder, device) for name, folder in folders.items()}
    rounds: dict[str, list[float]] = {name: [] for name in ready}
    started = time.monotonic()
    for i in range(ROUNDS):
        if i >= LEAST_ROUNDS and time.monotonic() - started > BUDGET_S:
            break
        for name in list(ready) if i % 2 else reversed(ready):
            rounds[name].append(1e3 * _run_s(ready[name]) / ready[name].megapixels)
    return {
        name: Cost(
            subject=one.session.digest,
            hardware=hardware(one.session.provider),
            ms_per_megapixel=tuple(rounds[name]),
            memory_mib=one.memory_mib,
        )
        for name, one in ready.items()
    }


def hardware(provider: str) -> str:
    """Execution provider, processor and number of CPUs, or the GPU: what figures may be compared on."""
    if provider == CPU:
        found = re.search(r"model name\s*: (.*)", _text("/proc/cpuinfo"))
        return f"{provider}, {found[1] if found else platform.machine()}, {_cpus()} CPUs"
    models = (
        re.search(r"Model:\s*(.*)", _text(str(p))) for p in Path("/proc/driver/nvidia/gpus").glob("*/information")
    )
    return f"{provider}, {next((m[1] for m in models if m), 'GPU')}"


def _plausible(folder: Path, device: Device) -> _Ready:
    """Opened again where other threads let go of more meanwhile than a small session takes."""
    for _ in range(TRIES):
        ready = _open(folder, device)
        if ready.memory_mib is None or ready.memory_mib > 0:
            break
    return ready


def _open(folder: Path, device: Device) -> _Ready:
    gc.collect()  # what goes meanwhile would be counted as the session's
    before = _in_use_mib()
    session = artifact.load(folder, device=device)
    opened = _in_use_mib()
    spec = session.card.spec
    fixed = not any(artifact.axis_of(axis)[1] == "h" for axis in spec.inputs[0].shape)
    given = probe(session.card, SIDE_PX, BATCH if fixed else 1)
    filled = _in_use_mib()
    start = time.perf_counter()
    made = session.run(given)
    repeats = max(1, int(ROUND_S / (time.perf_counter() - start)))
    picture = (made[spec.outputs[0].name] if spec.kind == "generate" else given[spec.inputs[0].name]).shape
    del made
    ran = _in_use_mib()
    known = session.provider == CPU and None not in (before, opened, filled, ran)
    memory = (opened - before) + (ran - filled) if known else None  # type: ignore[operator]
    return _Ready(session, given, picture[0] * picture[-2] * picture[-1] / 1e6, repeats, memory)


def _run_s(ready: _Ready) -> float:
    clock = time.process_time if ready.session.provider == CPU else time.perf_counter
    start = clock()
    for _ in range(ready.repeats):
        ready.session.run(ready.given)
    return (clock() - start) / ready.repeats


class _Mallinfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _in_use_mib() -> float | None:
    """What this process holds of the C library's memory; None where it is not glibc, which alone tells.

    Resident memory would not do: what was freed and is used again does not show in it.
    """
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return float(found.uordblks + found.hblkhd) / 2**20


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
