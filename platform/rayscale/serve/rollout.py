"""Which versions serve: the routing table, and how it follows the registry's aliases without a seam.

A moved alias is prepared by every live engine first (download, digest, golden probe, warm-up), in a gateway or behind
a handle; then one table is published. The version before stays listed, so replicas keep it warm for a rollback, which
comes by itself where the new one fails too often in its first minutes, and stays until the alias moves.
Pure: no Ray, no MLflow, no clock of its own. `app.py` gives it a home, `follower.py` is a replica's side of it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rayscale import contract
from rayscale.errors import ConfigError, MissingError, nearest
from rayscale.observe import log
from rayscale.serve.batching import Known, Outcome
from rayscale.storage import Store

if TYPE_CHECKING:  # MLflow: only the process that reads the registry pays for it
    from rayscale.registry.models import Registry


@dataclass(frozen=True, kw_only=True)
class Release:
    """A registered version, as far as serving needs it."""

    name: str
    version: int
    digest: str
    uri: str  # of the artifact's folder

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """A version that a route does not follow, though its alias points there."""

    digest: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Who answers for which route. Versions without a route are to be kept warm."""

    generation: int = 0
    routes: Mapping[str, tuple[tuple[str, float], ...]] = field(default_factory=dict)
    """"name@alias" -> (digest, weight), ...; the weights of a route add up to 1."""
    versions: Mapping[str, Release] = field(default_factory=dict)
    """digest -> release."""
    rolled_back: Mapping[str, Rollback] = field(default_factory=dict)
    """By route, until its alias moves."""
    schema: int = contract.SCHEMA

    @property
    def routed(self) -> frozenset[str]:
        """Every digest that may be asked to answer."""
        return frozenset(digest for shares in self.routes.values() for digest, _ in shares)

    def pick(self, route: str, draw: float) -> Release:
        """The release that answers a request, by `draw` in [0, 1). Raises: MissingError for an unknown route."""
        if route not in self.routes:
            raise MissingError("model", route, "is not served here", nearest(route, self.routes))
        for digest, weight in self.routes[route]:
            draw -= weight
            if draw < 0:
                return self.versions[digest]
        return self.versions[self.routes[route][-1][0]]  # the weights' rounding


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a replica says at every sync."""

    replica: str
    runs: bool = True  # it loads models itself; False: a gateway that asks engines
    known: Mapping[str, Known] = field(default_factory=dict)  # of an engine, what others need to know of its models
    prepared: frozenset[str] = frozenset()  # digests it can answer with now
    failed: Mapping[str, str] = field(default_factory=dict)  # digest -> why; it tries again by itself
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)  # by digest, since the replica started
    table: Table = Table()  # the one it follows: a second copy, should the rollout lose its own


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a replica is told: the table, what to prepare (most urgent first), and what is held back and why."""

    table: Table
    prepare: tuple[Release, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)  # route -> why it does not follow its alias
    # For gateways that ask engines; empty for those that run models themselves:
    num_engines: int = 0
    known: Mapping[str, Known] = field(default_factory=dict)  # what the engines can answer with
    failed: Mapping[str, str] = field(default_factory=dict)  # digest -> why no engine has it


@dataclass(frozen=True, kw_only=True)
class Desired:
    """What the registry says: where each alias points, and which aliases cannot be followed, and why."""

    routes: Mapping[str, Release] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()  # of every registered model


FAILURES, FAILURE_RATE = 5, 0.2  # at least so many, and such a share of all: the version is rolled back


@dataclass(eq=False)
class _Trial:
    """The first minutes of a version on a route."""

    digest: str
    before: tuple[tuple[str, float], ...]  # the route's shares until then
    until: float
    base: dict[str, Outcome]  # by replica, of a time before this one
    now: dict[str, Outcome]

    def outcome(self) -> Outcome:
        """Of all replicas, also of those that died meanwhile."""
        ok = sum(max(0, outcome.ok - self.base.get(k, Outcome()).ok) for k, outcome in self.now.items())
        failed = sum(max(0, outcome.failed - self.base.get(k, Outcome()).failed) for k, outcome in self.now.items())
        return Outcome(ok, failed)


class Rollout:
    """The state machine. `desire` what the registry says, `sync` every replica; both may publish a new table."""

    def __init__(
        self, table: Table | None = None, *, now: float, stale_s: float = 5.0, probation_s: float = 600.0
    ) -> None:
        """`table`: the one that was kept; `stale_s`: a replica that has been silent for so long is dead.

        `probation_s`: how long a new version is watched; 0: not at all.
        """
        self.table = table or Table()
        self.stale_s, self.probation_s = stale_s, probation_s
        self._trials: dict[str, _Trial] = {}  # by route
        # Replicas that outlived the rollout's process get the time to be heard before anything moves.
        self._publish_from = now + stale_s if self.table.routes else now
        self._desired: Desired | None = None  # unknown until the registry has answered once
        self._replicas: dict[str, tuple[float, Report]] = {}
        self._known: dict[str, Known] = {}  # also while no engine is awake

    def desire(self, desired: Desired, now: float) -> None:
        """The registry's word. A route whose alias was deleted is closed, one that cannot be followed stays.

        One whose model is gone altogether stays too: more likely a database was lost than a service given up.
        """
        self._desired = desired
        self._settle(now)

    def sync(self, report: Report, now: float) -> Orders:
        """Take a replica's report and answer with its orders."""
        if report.table.generation > self.table.generation:
            log.warning("replica %s follows table %d, newer than %d: taken over", report.replica,
                        report.table.generation, self.table.generation)  # fmt: skip
            self.table = report.table
        self._replicas[report.replica] = (now, report)
        self._judge(now)
        self._settle(now)
        orders = Orders(table=self.table, prepare=self._prepare(), held=self.held())
        return orders if report.runs else self._for_gateway(orders)

    def _for_gateway(self, orders: Orders) -> Orders:
        """What engines can answer with. While all of them sleep it is what they could: a request wakes one."""
        engines = [report for _, report in self._replicas.values() if report.runs]
        named = {release.digest for release in orders.prepare}
        for engine in engines:
            self._known |= engine.known
        self._known = {digest: known for digest, known in self._known.items() if digest in named}
        has = {digest for engine in engines for digest in engine.prepared} if engines else set(self._known)
        failed = {digest: why for engine in engines for digest, why in engine.failed.items() if digest not in has}
        known = {digest: known for digest, known in self._known.items() if digest in has}
        return replace(orders, num_engines=len(engines), known=known, failed=failed)

    def held(self) -> dict[str, str]:
        """Routes that do not follow their alias yet, and why: what failed, or who is still preparing."""
        if self._desired is None:
            return {}
        waiting = {route: self._why(release) for route, release in self._pending().items()}
        lost = [route for route in self.table.routes if route.partition("@")[0] not in self._desired.names]
        gone = dict.fromkeys(lost, "the model is gone from the registry")
        back = {route: rollback.why for route, rollback in self.table.rolled_back.items()}
        return gone | waiting | back | dict(self._desired.refused)

    def _pending(self) -> dict[str, Release]:
        desired = self._desired.routes if self._desired else {}
        back = {(route, rollback.digest) for route, rollback in self.table.rolled_back.items()}
        return {
            route: release
            for route, release in desired.items()
            if self.table.routes.get(route) != ((release.digest, 1.0),) and (route, release.digest) not in back
        }

    def _judge(self, now: float) -> None:
        """Roll back what fails too often on probation."""
        for route, trial in list(self._trials.items()):
            if now >= trial.until or self.table.routes.get(route) != ((trial.digest, 1.0),):
                del self._trials[route]
                continue
            trial.now |= self._outcomes(trial.digest)
            ok, failed = trial.outcome()
            if failed >= FAILURES and failed >= FAILURE_RATE * (ok + failed):
                why = f"{self.table.versions[trial.digest]} was rolled back: {failed} of {ok + failed} runs failed"
                log.error("%s: %s", route, why)
                back = {**self.table.rolled_back, route: Rollback(digest=trial.digest, why=why)}
                routes, versions = {**self.table.routes, route: trial.before}, self.table.versions
                self._publish(Table(routes=routes, versions=versions, rolled_back=back))

    def _outcomes(self, digest: str) -> dict[str, Outcome]:
        """By replica."""
        return {name: report.outcomes.get(digest, Outcome()) for name, (_, report) in self._replicas.items()}

    def _why(self, release: Release) -> str:
        reports = [report for _, report in self._replicas.values() if report.runs]
        for report in reports:
            if release.digest in report.failed and release.digest not in report.prepared:
                return f"{release} is refused: {report.failed[release.digest]}"
        ready = sum(release.digest in report.prepared for report in reports)
        return f"{release} is being prepared: {ready} of {len(reports)} engines are ready"

    def _prepare(self) -> tuple[Release, ...]:
        """Routes first (a new replica's way to readiness), then what is pending, then what stays warm."""
        routed = self.table.routed
        releases = [self.table.versions[digest] for digest in sorted(routed)]
        releases += self._pending().values()
        releases += [release for digest, release in self.table.versions.items() if digest not in routed]
        return tuple({release.digest: release for release in releases}.values())

    def _settle(self, now: float) -> None:
        """Publish what every live replica has prepared, all in one new table."""
        self._replicas = {k: (seen, r) for k, (seen, r) in self._replicas.items() if now - seen < self.stale_s}
        if self._desired is None:
            return
        followed = {*self._desired.routes, *self.held()}
        routes = {route: shares for route, shares in self.table.routes.items() if route in followed}
        moved = {}
        engines = [report for _, report in self._replicas.values() if report.runs]
        if engines and now >= self._publish_from:
            ready = frozenset.intersection(*(engine.prepared for engine in engines))
            moved = {route: release for route, release in self._pending().items() if release.digest in ready}
        for route, release in moved.items():
            if (before := self.table.routes.get(route)) and self.probation_s:
                base, until = self._outcomes(release.digest), now + self.probation_s
                self._trials[route] = _Trial(release.digest, before, until, base, {})
            routes[route] = ((release.digest, 1.0),)
        back = {
            route: rollback
            for route, rollback in self.table.rolled_back.items()
            if route in routes and self._desired.routes.get(route, rollback).digest == rollback.digest
        }
        if (routes, back) == (self.table.routes, self.table.rolled_back):
            return
        known = {**self.table.versions, **{r.digest: r for r in moved.values()}}
        replaced = {digest for route in moved for digest, _ in self.table.routes.get(route, ())}
        renewed = {release.name for release in moved.values()}
        routed = {digest for shares in routes.values() for digest, _ in shares}
        keep = {
            digest: release
            for digest, release in known.items()
            if digest in routed or digest in replaced or release.name not in renewed
        }
        self._publish(Table(routes=routes, versions=keep, rolled_back=back))

    def _publish(self, table: Table) -> None:
        self.table = replace(table, generation=self.table.generation + 1)
        routes = ", ".join(f"{route} -> {table.versions[s[0][0]]}" for route, s in sorted(table.routes.items()))
        log.info("table %d: %s", self.table.generation, routes)


# --- where the desired state and the last table are kept --------------------------------------------------------


def route_of(model: str) -> str:
    """ "name" -> "name@champion"."""
    return model if "@" in model else f"{model}@champion"


def read_desired(
    registry: Registry, models: tuple[str, ...], gated: Callable[[str, str], bool] | None = None
) -> Desired:
    """Ask the registry. `models`: "name@alias", with `*` in the name for any that has the alias.

    gated: did this digest of this name pass its gate? None: an alias is followed in any case.
    Raises: UnavailableError when it does not answer.
    """
    routes: dict[str, Release] = {}
    refused: dict[str, str] = {}
    registered = registry.names()
    for pattern in models:
        name_pattern, _, alias = route_of(pattern).partition("@")
        is_pattern = any(c in name_pattern for c in "*?[")
        names = fnmatch.filter(registered, name_pattern) if is_pattern else [name_pattern]
        for name in names:
            route = f"{name}@{alias}"
            try:
                v = registry.resolve(route)
            except MissingError:
                continue
            except ConfigError as error:  # another tool's version, or a malformed reference
                refused[route] = str(error)
                continue
            if gated is not None and not gated(v.name, v.digest):
                refused[route] = f"{v} passed no gate, and require_gate is set; `rayscale promote {v} --alias {alias}`"
                continue
            routes[route] = Release(name=v.name, version=v.version, digest=v.digest, uri=v.uri)
    return Desired(routes=routes, refused=refused, names=frozenset(registered))


def read_table(store: Store, key: str) -> Table:
    """The table as it was last kept, an empty one where there is none."""
    return contract.loads(Table, store.read(key), key) if store.exists(key) else Table()


def write_table(store: Store, key: str, table: Table) -> None:
    store.write(key, contract.dumps(table).encode())
