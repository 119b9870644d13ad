"""Who moved which alias when: read from the MLflow runs that `promote` and `rollback` leave behind.

MLflow keeps no history of its aliases, so what was moved by hand is seen only where it does not fit what is recorded.
"""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rayscale.errors import ConflictError
from rayscale.observe import log
from rayscale.registry.models import Registry, Version, pages
from rayscale.tracking import answering

EXPERIMENT = "promotions"
PROMOTE, HOLD, ROLLBACK = "promote", "hold", "rollback"


@dataclass(frozen=True, kw_only=True)
class Move:
    """One decision about an alias."""

    at: str  # UTC, ISO 8601
    alias: str
    decision: str  # promote, hold, rollback
    moved: bool  # did the alias move?
    version: int  # to which
    before: int | None = None  # from which; None: from nowhere, or not recorded
    digest: str = ""
    who: str = ""
    reason: str = ""
    run_id: str = ""


def read(registry: Registry, name: str) -> tuple[Move, ...]:
    """Every decision about a model's aliases, oldest first."""
    with answering(registry.uri):
        experiment = registry.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return ()
        query = {"filter_string": f"tags.model = '{name}'", "order_by": ["attributes.start_time ASC"]}
        runs = list(pages(registry.client.search_runs, experiment_ids=[experiment.experiment_id], **query))
    return tuple(_move(run) for run in runs)


def move(registry: Registry, version: Version, alias: str, before: int | None) -> None:
    """Point the alias at this version, if it is still where it was. Raises: ConflictError."""
    # MLflow has no compare-and-swap: looking once more leaves milliseconds instead of the minutes of scoring.
    now = registry.aliases(version.name).get(alias)
    if now != before:
        rule = f"moved from {before} to {now} meanwhile"
        raise ConflictError("alias", f"{version.name}@{alias}", rule, "try again, against the new holder")
    registry.alias(version.name, alias, version.version)
    log.info("%s is now %s", alias, version)


def tags(name: str, version: int, digest: str, alias: str, decision: str, before: int | None) -> dict[str, str]:
    """What a run of such a decision is tagged with, for `read`."""
    return {"model": name, "version": str(version), "digest": digest, "alias": alias, "decision": decision,
            "before": "" if before is None else str(before), "mlflow.user": _user()}  # fmt: skip


def holders(moves: Sequence[Move], alias: str, now: int | None) -> tuple[int, ...]:
    """The versions that an alias stood at, oldest first, the present one (`now`) last.

    A rollback goes back along them, so after it the one that was left is none of them.
    """
    stack: list[int] = []
    for move in moves:
        if move.alias != alias or not move.moved:
            continue
        if move.before is not None:
            _put_back(stack, move.before)  # moved by hand in between
        if move.decision == ROLLBACK:
            _put_back(stack, move.version)
        elif stack[-1:] != [move.version]:
            stack.append(move.version)
    if now is not None:
        _put_back(stack, now)
    return tuple(stack)


def _put_back(stack: list[int], version: int) -> None:
    """To where this version stood last, or, if it never did, on top."""
    if version not in stack:
        stack.append(version)
    while stack[-1] != version:
        stack.pop()


def last_known(moves: Sequence[Move], alias: str) -> int | None:
    """Where the records say that an alias points; None where they say nothing of it."""
    return next((move.version for move in reversed(moves) if move.alias == alias and move.moved), None)


def _move(run: Any) -> Move:
    found = run.data.tags
    return Move(
        at=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        alias=found.get("alias", ""),
        decision=found.get("decision", ""),
        moved=found.get("moved") == "yes",
        version=int(found.get("version", 0)),
        before=int(found["before"]) if found.get("before") else None,
        digest=found.get("digest", ""),
        who=found.get("mlflow.user", ""),
        reason=found.get("reason", ""),
        run_id=str(run.info.run_id),
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return ""
