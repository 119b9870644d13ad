"""Who a run is and where its workers started: `run.json` and `position.json` in its folder. No torch here.

The Ray Data side of a run reads its position through this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rayscale import contract
from rayscale.errors import MissingError
from rayscale.storage import join, open_store


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """`run.json`: the identity of a run. The same command resumes it; another recipe under its name is refused."""

    name: str
    uri: str
    recipe: str  # module:function
    overrides: tuple[str, ...]
    recipe_digest: str
    resolved: Mapping[str, Any]  # the whole recipe, to show what was edited
    datasets: tuple[str, ...]  # URIs
    manifest_digest: str
    plan_digest: str
    tracking_uri: str
    mlflow_run_id: str
    code_version: str
    status: Literal["running", "finished"] = "running"
    schema: int = contract.SCHEMA


def open_run(run_uri: str) -> RunRecord:
    """The record of a run. Raises: MissingError where there is none."""
    store = open_store(run_uri)
    if not store.exists("run.json"):
        raise MissingError("run", run_uri, "no run.json there", "give the folder that `train` printed as run_uri")
    return contract.loads(RunRecord, store.read("run.json"), join(run_uri, "run.json"))


def write_run(record: RunRecord) -> None:
    """Store the record in the run's folder."""
    open_store(record.uri).write("run.json", contract.dumps(record).encode())


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the run's workers: where from, and how many."""

    step: int
    checkpoint: str  # URI, "" at the very beginning
    world_size: int
    unix: float


@dataclass(frozen=True, kw_only=True)
class Position:
    """`position.json`: every start of the run; the last one is where it goes on from."""

    starts: tuple[Start, ...] = ()
    schema: int = contract.SCHEMA


def read_position(run_uri: str) -> Position:
    """All starts of the run so far."""
    store = open_store(run_uri)
    if not store.exists("position.json"):
        return Position()
    return contract.loads(Position, store.read("position.json"), join(run_uri, "position.json"))


def write_position(run_uri: str, start: Start) -> None:
    """Rank 0's decision, made before any worker asks for its data."""
    position = Position(starts=(*read_position(run_uri).starts, start))
    open_store(run_uri).write("position.json", contract.dumps(position).encode())


def start_step(run_uri: str) -> int:
    """The global step that the present workers start from."""
    return read_position(run_uri).starts[-1].step
