"""Who moved which alias when, and what the gate held back: the journal's moves, and the runs that decisions leave.

Every decision of the gate is an MLflow run with its report, in the experiment `promotions`. Before there were
journals these runs were all there was, of rollbacks too: they are still read.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rayscale.registry.journal import DONE, EXTERNAL, INTENT, ROLLBACK, TAKEN_BACK, Entry, Journal, chain, user
from rayscale.registry.models import Registry, pages
from rayscale.tracking import answering

EXPERIMENT = "promotions"
HOLD = "hold"
UNFINISHED = "unfinished: the next promotion or rollback writes down how far it came"


@dataclass(frozen=True, kw_only=True)
class Move:
    """One decision about an alias, and what came of it."""

    at: str  # UTC, ISO 8601
    alias: str
    decision: str  # promote, forced, hold, rollback, external (by hand), ...
    moved: bool  # did the alias move?
    version: int | None  # to which; None: the alias was deleted
    before: int | None = None  # from which; None: from nowhere, or not recorded
    digest: str = ""
    who: str = ""
    reason: str = ""
    run_id: str = ""
    why_not: str = ""  # why it did not move, where the decision does not say it


def read(registry: Registry, name: str) -> tuple[Move, ...]:
    """Every decision about a model's aliases, oldest first."""
    entries = Journal(registry, name).read()
    told = {entry.run_id for entry in entries}
    decided = (move for move in _decided(registry, name) if move.run_id not in told)
    return tuple(heapq.merge(_journalled(entries), decided, key=lambda move: move.at))


def _decided(registry: Registry, name: str) -> Iterator[Move]:
    """The runs of this model's decisions."""
    with answering(registry.uri):
        experiment = registry.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return
        query = {"filter_string": f"tags.model = '{name}'", "order_by": ["attributes.start_time ASC"]}
        yield from map(_move, pages(registry.client.search_runs, experiment_ids=[experiment.experiment_id], **query))


def _journalled(entries: Sequence[Entry]) -> Iterator[Move]:
    """The journal's intents with what came of them, and what was moved by hand."""
    counted = {e.id: e.number for alias in {e.alias for e in entries} for e in chain(entries, alias)}
    numbers = set(counted.values())
    settled = {e.after: e.kind for e in entries if e.number in numbers}
    for entry in entries:
        if entry.number in numbers and entry.kind == EXTERNAL:
            yield _told(entry, EXTERNAL, moved=True)
        elif entry.kind == INTENT and entry.number in numbers:
            came = settled.get(entry.id)
            why_not = {DONE: "", EXTERNAL: "it was moved by hand", None: UNFINISHED}.get(came, str(came))
            yield _told(entry, entry.decision, moved=came == DONE, why_not=why_not)
        elif entry.kind == INTENT and entry.id not in counted:  # else it was sent twice
            yield _told(entry, entry.decision, why_not="another one won")


def _told(entry: Entry, decision: str, *, moved: bool = False, why_not: str = "") -> Move:
    return Move(
        at=entry.at,
        alias=entry.alias,
        decision=decision,
        moved=moved,
        version=entry.to,
        before=entry.before,
        digest=entry.digest,
        who="" if entry.kind == EXTERNAL else entry.who,
        reason=entry.why,
        run_id=entry.run_id,
        why_not=why_not,
    )


def tags(name: str, version: int, digest: str, alias: str, decision: str, before: int | None) -> dict[str, str]:
    """What a run of such a decision is tagged with, for `read`."""
    return {"model": name, "version": str(version), "digest": digest, "alias": alias, "decision": decision,
            "before": "" if before is None else str(before), "mlflow.user": user()}  # fmt: skip


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
        if move.version is None:
            continue
        if move.decision in (ROLLBACK, TAKEN_BACK):
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


def unrecorded(moves: Sequence[Move], aliases: dict[str, int]) -> dict[str, int | None]:
    """Aliases that stand elsewhere than the records say, and where: moved by hand."""
    found = {}
    for alias in sorted({*aliases, *(move.alias for move in moves)}):
        now, mine = aliases.get(alias), [move for move in moves if move.alias == alias]
        known = next((move.version for move in reversed(mine) if move.moved), None)
        if now != known and not any(move.why_not == UNFINISHED and move.version == now for move in mine):
            found[alias] = now
    return found


def _move(run: Any) -> Move:
    found = run.data.tags
    return Move(
        at=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="milliseconds"),
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
