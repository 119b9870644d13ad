"""The journal of a model's aliases: one line of moves, whoever races, crashes, or loses MLflow in the middle.

MLflow's aliases have neither history nor compare-and-swap. The journal is a registered model of its own,
`NAME--releases`: MLflow's version counter puts the entries of all writers into one order. An entry counts if its
`after` is the entry that counted last and its `before` is where that one left the alias; so of two intents the first
counts, and the other's promoter is told who won. The alias is the truth and the journal its history: healing writes
down what happened and never moves an alias, and what an operator moved by hand stays there, as `external`.

Holds whatever happens: two moves never both count from one predecessor, and who was told of success has its `done`.
Cannot be proven, because no condition travels with MLflow's request: that an alias is set while its intent still
counts. Others leave an intent alone for PATIENCE_S and its owner starts to set the alias within HASTE_S, having
looked once more; who was slower than that all the same sees it afterwards and takes the move back. What is left: a
request that MLflow carries out after its sender died is found as `external` by the next command, and a hand that
moves the alias between our look and our request, milliseconds, is overwritten.
"""

from __future__ import annotations

import getpass
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from rayscale import contract
from rayscale.contract import SCHEMA
from rayscale.errors import ConflictError, RayscaleError, UnavailableError
from rayscale.observe import log
from rayscale.registry.models import JOURNAL, Registry, Version, check_alias, pages, unless
from rayscale.tracking import answering, error_code

Kind = Literal["intent", "done", "abandoned", "external"]
INTENT: Kind = "intent"
DONE: Kind = "done"
ABANDONED: Kind = "abandoned"
EXTERNAL: Kind = "external"
PROMOTE, FORCED, ROLLBACK, TAKEN_BACK = "promote", "forced", "rollback", "taken back"
GATED = (PROMOTE, FORCED)  # decisions of a gate that let a version pass

PATIENCE_S = 10.0  # that another's unfinished move is left alone
HASTE_S = PATIENCE_S / 2  # from before one's own intent to setting the alias; the rest is for the request
POLL_S = 0.1
_SOURCE = "rayscale:/journal"  # MLflow wants one of every version
_ENTRY, _GATED = "entry", "gated"  # tags: the entry as JSON; the digest that passed its gate, to be searched for


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the journal. Versions are numbers, None where there is no such alias."""

    kind: Kind
    alias: str
    before: int | None
    to: int | None
    digest: str = ""  # of `to`
    decision: str = ""  # promote, forced, rollback, ...: of an intent, and of the `done` that settles it
    why: str = ""
    who: str = ""  # moves it, or saw that it was moved
    run_id: str = ""  # of the gate's decision, in MLflow
    weight: float | None = None  # percent of the requests, of a canary
    id: str  # a request that was sent twice makes two versions with one id
    after: str  # id of the entry that counted last for this alias, "" for the first
    number: int = 0  # its place: MLflow's version
    at: str = ""  # UTC, ISO 8601, by MLflow's clock
    schema: int = SCHEMA

    @property
    def stands(self) -> int | None:
        """Where the alias stands after this entry."""
        return self.to if self.kind in (DONE, EXTERNAL) else self.before

    def __str__(self) -> str:
        path = f"from {self.before or 'none'} to {self.to or 'none'}"
        match self.kind:
            case "intent":
                return f"{self.who or 'somebody'} is moving it {path} ({self.decision})"
            case "done":
                return f"{self.who or 'somebody'} moved it {path} ({self.decision})"
            case "abandoned":
                return f"the move {path} ({self.decision}) was given up for dead by {self.who or 'somebody'}"
            case _:
                return f"it was moved {path} by hand"


def chain(entries: Sequence[Entry], alias: str) -> tuple[Entry, ...]:
    """The entries that count for an alias, in order. What counts never ceases to, whatever comes later."""
    counted: list[Entry] = []
    for entry in sorted(entries, key=lambda e: e.number):
        last = counted[-1] if counted else None
        if entry.alias != alias or entry.after != (last.id if last else ""):
            continue
        if last and entry.before != last.stands:
            continue
        unsettled = last is not None and last.kind == INTENT
        if (entry.kind in (DONE, ABANDONED) and not unsettled) or (entry.kind == INTENT and unsettled):
            continue
        counted.append(entry)
    return tuple(counted)


def due(last: Entry | None, stands: int | None) -> Kind | None:
    """The entry that is missing where the journal ends with `last` and the alias stands there; None: they agree."""
    if last is None:
        return None  # nothing was promised of it
    if last.kind == INTENT:
        return DONE if stands == last.to else ABANDONED if stands == last.before else EXTERNAL
    return None if stands == last.stands else EXTERNAL


class Journal:
    """The journal of one model, and the only way of ours to move its aliases."""

    def __init__(self, registry: Registry, name: str, *, patience_s: float = PATIENCE_S) -> None:
        self.registry, self.name, self.patience_s = registry, name, patience_s
        self._model = f"{name}{JOURNAL}"

    def read(self) -> tuple[Entry, ...]:
        """Every entry, in order, also those that do not count; none where there is no journal yet."""
        with answering(self.registry.uri):
            search, name = self.registry.client.search_model_versions, f"name='{self._model}'"
            found = list(pages(search, filter_string=name, order_by=["version_number ASC"]))
        return tuple(_entry(version) for version in found if _ENTRY in version.tags)

    def last(self, alias: str) -> Entry | None:
        """The entry of an alias that counted last."""
        counted = chain(self.read(), alias)
        return counted[-1] if counted else None

    def append(self, entry: Entry) -> None:
        """Write an entry down; whether it counts is told by `chain` alone."""
        tags = {_ENTRY: contract.dumps(entry)}
        if entry.decision in GATED:
            tags[_GATED] = entry.digest
        with answering(self.registry.uri):
            try:
                self._create(entry, tags)
            except Exception as error:
                if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
                    raise
                about = f"Who moved which alias of {self.name}, kept by rayscale: not to be edited."
                with unless("RESOURCE_ALREADY_EXISTS"):
                    self.registry.client.create_registered_model(self._model, description=about)
                self._create(entry, tags)

    def _create(self, entry: Entry, tags: dict[str, str]) -> None:
        told = f"{entry.kind}: {entry.alias}, {entry}. {entry.why}".strip()
        self.registry.client.create_model_version(
            self._model, _SOURCE, entry.run_id or None, tags, description=told, await_creation_for=0
        )

    def heal(self, alias: str) -> tuple[Entry | None, int | None]:
        """Write down what happened to an alias and is not in the journal; no alias moves.

        Returns the entry that counted last and where the alias stands, which agree. Another's unfinished move has
        `patience_s` to be settled by its owner.
        """
        waiting, until = "", 0.0
        while True:
            last = self.last(alias)
            stands = self._stands(alias)  # after the journal: what moved in between makes our entry one too late
            kind = due(last, stands)
            if last is None or kind is None:
                return last, stands
            if last.kind == INTENT and kind != DONE:
                if waiting != last.id:
                    waiting, until = last.id, time.monotonic() + self.patience_s
                    log.info("%s@%s: %s, waiting for it to end", self.name, alias, last)
                if time.monotonic() < until:
                    time.sleep(POLL_S)
                    continue
            self._settle(last, kind, stands)

    def move(
        self,
        alias: str,
        to: Version | None,
        *,
        before: int | None,
        decision: str,
        why: str = "",
        run_id: str = "",
        weight: float | None = None,
    ) -> Entry:
        """Point an alias at a version (None: delete it) if it still stands at `before`. Returns its `done`.

        Raises: ConflictError, which names who moved it meanwhile; UnavailableError: the next move, or `heal`, finds
        out how far this one came.
        """
        check_alias(alias)
        last, stands = self.heal(alias)
        if stands != before:
            raise self._conflict(alias, last or self.last(alias), f"it was moved from {before} to {stands} by hand")
        began = time.monotonic()
        intent = Entry(
            kind=INTENT,
            alias=alias,
            before=before,
            to=None if to is None else to.version,
            digest="" if to is None else to.digest,
            decision=decision,
            why=why,
            who=user(),
            run_id=run_id,
            weight=weight,
            id=uuid.uuid4().hex,
            after=last.id if last else "",
        )
        self.append(intent)
        self._check(intent)
        if time.monotonic() - began > HASTE_S:
            self._settle(intent, ABANDONED, before)
            rule = f"MLflow took longer than {HASTE_S:g} s to answer, nothing was moved"
            raise UnavailableError("alias", f"{self.name}@{alias}", rule, "run this again")
        self._point(alias, intent.to)
        done = self._concluded(intent)
        log.info("%s is now %s", alias, to or "no version")
        return done

    def _check(self, intent: Entry) -> None:
        """Immediately before moving: does the intent count, is the alias where it was? Raises: ConflictError."""
        last = self.last(intent.alias)
        if last is None or last.id != intent.id:
            raise self._conflict(intent.alias, last, "the journal was deleted meanwhile")
        stands = self._stands(intent.alias)
        if due(intent, stands) == EXTERNAL:
            self._settle(intent, EXTERNAL, stands)
            raise self._conflict(intent.alias, None, f"it was moved from {intent.before} to {stands} by hand")

    def _concluded(self, intent: Entry) -> Entry:
        """Immediately after moving: write down what came of it; what is read back is what holds.

        Raises: ConflictError where another one settled the intent otherwise.
        """
        stands = self._stands(intent.alias)
        self._settle(intent, DONE if stands == intent.to else EXTERNAL, stands)
        counted = chain(self.read(), intent.alias)
        settled = next((entry for entry in counted if entry.after == intent.id), None)
        if settled is not None and settled.kind == DONE:
            return settled
        if settled is not None and settled.kind == ABANDONED:
            self._take_back(intent)
        raise self._conflict(intent.alias, counted[-1] if counted else None, "the journal was deleted meanwhile")

    def _take_back(self, intent: Entry) -> None:
        """We moved the alias after our intent had been given up: another move gives it back to where it was."""
        if intent.decision == TAKEN_BACK:
            return
        where = f"{self.name}@{intent.alias}"
        try:
            last, _ = self.heal(intent.alias)  # who is moving it now ends first; to the journal our move is a hand's
            if last is None or last.kind != EXTERNAL or last.to != intent.to:
                return  # it was moved on
            log.warning("%s: our move to %s came too late, %s gets it back", where, intent.to, last.before or "nobody")
            holder = None if last.before is None else self.registry.resolve(f"{self.name}:{last.before}")
            why = f"the move to {intent.to} came after it had been given up"
            self.move(intent.alias, holder, before=intent.to, decision=TAKEN_BACK, why=why)
        except RayscaleError as error:
            log.warning("%s: it was not taken back: %s", where, error)

    def _settle(self, last: Entry, kind: Kind, stands: int | None) -> None:
        """Append what is due after `last`."""
        entry = replace(last, kind=kind, before=last.stands, id=uuid.uuid4().hex, after=last.id, number=0, at="")
        if kind != DONE:  # a move is its promoter's, whoever writes that it is done
            entry = replace(entry, who=user())
        if kind == EXTERNAL:
            entry = replace(entry, to=stands, digest=self._digest(stands), decision="", why="", run_id="", weight=None)
        log.info("%s@%s: %s", self.name, last.alias, entry)
        self.append(entry)

    def _digest(self, version: int | None) -> str:
        try:
            return "" if version is None else self.registry.resolve(f"{self.name}:{version}").digest
        except UnavailableError:
            raise
        except RayscaleError:  # another tool's version
            return ""

    def _stands(self, alias: str) -> int | None:
        return self.registry.aliases(self.name).get(alias)

    def _point(self, alias: str, version: int | None) -> None:
        with answering(self.registry.uri):
            if version is None:
                self.registry.client.delete_registered_model_alias(self.name, alias)
            else:
                self.registry.client.set_registered_model_alias(self.name, alias, str(version))

    def _conflict(self, alias: str, winner: Entry | None, otherwise: str) -> ConflictError:
        rule = str(winner) if winner is not None else otherwise
        return ConflictError("alias", f"{self.name}@{alias}", rule, "try again, against the new holder")


def gated(registry: Registry, name: str, digest: str, alias: str) -> bool:
    """Did this digest pass the gate for this alias of this model, or was it forced onto it, as the journal says?

    A gate holds a candidate against the holder of one alias, with the rules that were given for it: it says nothing
    of another alias. Raises: UnavailableError.
    """
    query = f"name='{name}{JOURNAL}' and tags.{_GATED}='{digest}'"
    with answering(registry.uri):
        found = list(pages(registry.client.search_model_versions, filter_string=query))
    # Entries have always named their alias: those that are older than this rule are asked for it as well.
    return any(_entry(version).alias == alias for version in found if _ENTRY in version.tags)


def user() -> str:
    """Who runs this, "" in a container whose user has no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _entry(found: Any) -> Entry:
    entry = contract.loads(Entry, found.tags[_ENTRY], f"{found.name}:{found.version}")
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC).isoformat(timespec="milliseconds")
    return replace(entry, number=int(found.version), at=created)
