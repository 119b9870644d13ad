"""Which versions serve: the routing table, and how it follows the registry's aliases without a seam.

A moved alias is prepared by every live engine of its model's pool first (download, digest, golden probe, warm-up), in
a gateway or behind a handle; then one table is published. The version before stays listed, so replicas keep it warm
for a rollback, which comes by itself where the new one fails too often in its first minutes, and stays until the alias
moves. A canary has a share of a route beside its champion, and loses it where it does worse.
Pure: no Ray, no MLflow, no clock of its own. `keeper.py` gives it a home, `follower.py` is a replica's side of it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rayscale.errors import ConfigError, MissingError, RayscaleError, UnavailableError
from rayscale.observe import log
from rayscale.registry.canary import OVER, ROLLED_BACK, alias_of, end, read_share, write_taken_back
from rayscale.serve.batching import Known, Outcome
from rayscale.serve.meters import Meters
from rayscale.serve.pools import Pool, Pools, pool_of
from rayscale.serve.table import Release, Rollback, Shares, Table, route_of
from rayscale.serve.trial import Trial

if TYPE_CHECKING:  # MLflow: only the process that reads the registry pays for it
    from rayscale.registry.models import Registry, Version


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a replica says at every sync."""

    replica: str
    runs: bool = True  # it loads models itself; False: a gateway that asks engines
    pool: str = ""  # whose models it runs
    known: Mapping[str, Known] = field(default_factory=dict)  # of an engine, what others need to know of its models
    prepared: frozenset[str] = frozenset()  # digests it can answer with now
    failed: Mapping[str, str] = field(default_factory=dict)  # digest -> why; it tries again by itself
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)  # by digest, since the replica started
    table: Table = Table()  # the last it was told: a second copy, should the rollout lose its own


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a replica is told: the table, what to prepare (most urgent first), and what is held back and why."""

    table: Table
    prepare: tuple[Release, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)  # route -> why it does not follow its alias
    heard: bool = True  # the registry has answered
    watched: Mapping[str, str] = field(default_factory=dict)  # "name:version" on trial -> how it does
    others: bool = False  # engines of its pool answer what it cannot: nobody needs it before it is ready
    pools: Mapping[str, Pool] = field(default_factory=dict)  # for gateways that ask engines


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A version that is to answer a share of a route's requests."""

    release: Release
    weight: float  # in (0, 1)
    key: str  # which start of it: one that was rolled back may be started again


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What the registry is to be told: a canary is over, or a version was rolled back by itself."""

    route: str
    release: Release
    why: str
    canary: str = ""  # its key; "": it was the champion, and the alias still points there
    instead: Release | None = None  # what answers since it was rolled back; None: it was not


@dataclass(frozen=True, kw_only=True)
class Desired:
    """What the registry says: where each alias points, and which aliases cannot be followed, and why."""

    routes: Mapping[str, Release] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()  # of every registered model
    canaries: Mapping[str, Canary] = field(default_factory=dict)  # by route
    over: tuple[Ending, ...] = ()  # canaries whose time or whose champion has passed


class Rollout:
    """The state machine. `desire` what the registry says, `sync` every replica; both may publish a new table."""

    def __init__(
        self,
        table: Table | None = None,
        *,
        now: float,
        stale_s: float = 5.0,
        probation_s: float = 600.0,
        pools: Pools | None = None,
        meters: Meters | None = None,
    ) -> None:
        """`table`: the one that was kept; `stale_s`: a replica that has been silent for so long is dead.

        `probation_s`: how long a new version is watched, and the window in which a canary is; 0: not at all.
        `pools`: a version waits for the engines of its own pool only.
        """
        self.table = table or Table()
        self.stale_s, self.probation_s, self._pools, self._meters = stale_s, probation_s, pools or {}, meters
        self.endings: list[Ending] = []  # to be told to the registry; who has done so takes them out
        self._ended: set[tuple[str, str]] = set()  # routes and canaries, which are few
        self._trials: dict[tuple[str, str], Trial] = {}  # by route and canary ("": its champion)
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
        self._end(desired.over)
        for route, canary in desired.canaries.items():  # rolled back in a former life, when the registry was away
            if self._is_back(route, canary.release.digest, canary.key):
                back = self.table.rolled_back[route]
                ending = Ending(route=route, release=canary.release, why=back.why, canary=canary.key,
                                instead=self.table.versions.get(back.champion))  # fmt: skip
                self._end([ending])
        self._settle(now)

    def sync(self, report: Report, now: float) -> Orders:
        """Take a replica's report and answer with its orders."""
        if report.table.generation > self.table.generation:
            log.warning("replica %s follows table %d, newer than %d: taken over", report.replica,
                        report.table.generation, self.table.generation)  # fmt: skip
            self.table = report.table
        self._replicas[report.replica] = (now, report)
        for trial in self._trials.values():
            trial.hear(report.replica, report.outcomes)
        self._judge(now)
        self._settle(now)
        prepare = self._prepare()
        heard = self._desired is not None
        orders = Orders(table=self.table, prepare=prepare, held=self.held(), heard=heard, watched=self._watched())
        if report.runs:
            own = tuple(release for release in prepare if self._pool_of(release) == report.pool)
            return replace(orders, prepare=own, others=self._others(report, now))
        named = {release.digest for release in prepare}
        for _, engine in self._replicas.values():
            self._known |= engine.known
        self._known = {digest: known for digest, known in self._known.items() if digest in named}
        return replace(orders, pools={pool: self._pool(pool, prepare) for pool in ("", *self._pools)})

    def _pool(self, name: str, prepare: Iterable[Release]) -> Pool:
        """What its engines can answer with. While all of them sleep it is what they could: a request wakes one."""
        engines = self._engines(name)
        digests = frozenset(release.digest for release in prepare if self._pool_of(release) == name)
        has = digests & ({d for e in engines for d in e.prepared} if engines else self._known.keys())
        failed = {d: why for e in engines for d, why in e.failed.items() if d in digests - has}
        known = {digest: self._known[digest] for digest in has if digest in self._known}
        return Pool(num_engines=len(engines), digests=digests, known=known, failed=failed)

    def _pool_of(self, release: Release) -> str:
        return pool_of(release.name, self._pools)

    def _engines(self, pool: str) -> list[Report]:
        """What those of a pool said last that answer: who has less of what is served than another holds nothing up."""
        engines = [report for _, report in self._replicas.values() if report.runs and report.pool == pool]
        served = self._served(pool)
        had = {served & engine.prepared for engine in engines}
        most = {one for one in had if not any(one < other for other in had)}
        return [engine for engine in engines if served & engine.prepared in most]

    def _served(self, pool: str) -> frozenset[str]:
        """Digests of its champions that the table names."""
        champions = (shares[0][0] for shares in self.table.routes.values())
        return frozenset(digest for digest in champions if self._pool_of(self.table.versions[digest]) == pool)

    def _others(self, report: Report, now: float) -> bool:
        """Whether others answer more than it can, as far as is known: a restarted rollout has not heard them yet."""
        served = self._served(report.pool)
        if not served or now < self._publish_from:
            return bool(served)
        return any(served & report.prepared < served & engine.prepared for engine in self._engines(report.pool))

    def held(self) -> dict[str, str]:
        """Routes that do not follow their alias yet, and why: what failed, or who is still preparing."""
        if self._desired is None:
            return {}
        waiting = {route: "; ".join(map(self._why, releases)) for route, releases in self._pending().items()}
        lost = [route for route in self.table.routes if route.partition("@")[0] not in self._desired.names]
        gone = dict.fromkeys(lost, "the model is gone from the registry")
        back = {route: rollback.why for route, rollback in self.table.rolled_back.items()}
        return gone | back | waiting | dict(self._desired.refused)

    def _watched(self) -> dict[str, str]:
        return {
            f"{self.table.versions[trial.digest]}": ("canary: " if trial.canary else "on probation: ") + trial.told()
            for trial in self._trials.values()
            if trial.digest in self.table.versions
        }

    def _pending(self) -> dict[str, list[Release]]:
        """By route, what is to answer for it and does not yet, because it is not prepared everywhere."""
        found: dict[str, list[Release]] = {}
        for route, release in (self._desired.routes if self._desired else {}).items():
            present = dict(self.table.routes.get(route, ()))
            if self._is_back(route, release.digest):
                continue
            wanted = [release, *([canary.release] if (canary := self._canary(route)) else [])]
            if missing := [r for r in wanted if r.digest not in present]:
                found[route] = missing
        return found

    def _is_back(self, route: str, digest: str, canary: str = "") -> bool:
        rollback = self.table.rolled_back.get(route)
        return rollback is not None and (rollback.digest, rollback.canary) == (digest, canary)

    def _canary(self, route: str) -> Canary | None:
        """What is to have a share beside the version that the route's alias points at."""
        canary = self._desired.canaries.get(route) if self._desired else None
        if canary is None or self._is_back(route, canary.release.digest, canary.key):
            return None
        return canary

    def _target(self, ready: frozenset[str]) -> dict[str, Shares]:
        """Every route with the shares that can be had now; `ready`: what every engine has prepared."""
        assert self._desired is not None
        refused, names = self._desired.refused, self._desired.names
        routes: dict[str, Shares] = {
            route: ((shares[0][0], 1.0),) for route, shares in self.table.routes.items()  # no canary stays unwatched
            if route in refused or route.partition("@")[0] not in names
        }  # fmt: skip
        for route, release in self._desired.routes.items():
            present = self.table.routes.get(route, ())
            can = ready.union(dict(present))
            follows = release.digest in can and not self._is_back(route, release.digest)
            if follows and (canary := self._canary(route)) and canary.release.digest in can:
                routes[route] = (release.digest, 1.0 - canary.weight), (canary.release.digest, canary.weight)
            elif follows or present:
                routes[route] = ((release.digest if follows else present[0][0], 1.0),)
        return routes

    def _judge(self, now: float) -> None:
        """Take back what does worse than the version beside it."""
        for (route, _), trial in list(self._trials.items()):
            shares = self.table.routes.get(route, ())
            canary = self._desired.canaries.get(route) if self._desired else None
            stands = trial.digest in dict(shares[1:] if trial.canary else shares[:1])
            if trial.canary:
                stands = stands and canary is not None and (canary.key, shares[0][0]) == (trial.canary, trial.beside)
            if not stands or (now >= trial.until and not trial.canary):
                del self._trials[route, trial.canary]
            elif why := trial.verdict():
                self._take_back(route, trial, why)
            elif now >= trial.until:
                self._watch(route, trial.digest, trial.beside, now, trial.canary)  # the next window

    def _watch(self, route: str, digest: str, beside: str, now: float, canary: str = "") -> None:
        if self.probation_s:
            trial = Trial(digest=digest, beside=beside, until=now + self.probation_s, canary=canary)
            self._trials[route, canary] = trial
            for name, (_, report) in self._replicas.items():
                trial.hear(name, report.outcomes)

    def _take_back(self, route: str, trial: Trial, why: str) -> None:
        release = self.table.versions[trial.digest]
        what = f"canary {release}" if trial.canary else f"{release}"
        rollback = Rollback(
            digest=trial.digest,
            why=f"{what} was rolled back: {why}",
            canary=trial.canary,
            champion=trial.beside if trial.canary else "",
        )
        log.error("%s: %s", route, rollback.why)
        if self._meters:
            of = "canary" if trial.canary else "champion"
            self._meters.add("rayscale_rollbacks_total", model=release.name, of=of)
        del self._trials[route, trial.canary]
        instead = self.table.versions[trial.beside]
        self._end([Ending(route=route, release=release, why=why, canary=trial.canary, instead=instead)])
        routes = {**self.table.routes, route: ((trial.beside, 1.0),)}
        self._publish(routes, {**self.table.rolled_back, route: rollback})

    def _end(self, endings: Iterable[Ending]) -> None:
        """Each canary's once, so that a registry that does not take it is not asked at every look."""
        new = [ending for ending in endings if (ending.route, ending.canary) not in self._ended]
        self._ended |= {(ending.route, ending.canary) for ending in new if ending.canary}
        self.endings += new

    def _why(self, release: Release) -> str:
        reports = self._engines(self._pool_of(release))
        for report in reports:
            if release.digest in report.failed and release.digest not in report.prepared:
                return f"{release} is refused: {report.failed[release.digest]}"
        ready = sum(release.digest in report.prepared for report in reports)
        return f"{release} is being prepared: {ready} of {len(reports)} engines are ready"

    def _prepare(self) -> tuple[Release, ...]:
        """Champions first (a new replica's way to readiness), then canaries, what is pending, what stays warm."""
        versions = self.table.versions
        champions = {shares[0][0] for shares in self.table.routes.values()}
        digests = [*sorted(champions), *sorted(self.table.routed - champions)]
        releases = [versions[digest] for digest in digests]
        releases += [release for pending in self._pending().values() for release in pending]
        releases += versions.values()
        return tuple({release.digest: release for release in releases}.values())

    def _settle(self, now: float) -> None:
        """Publish what every live engine has prepared, all in one new table."""
        self._replicas = {k: (seen, r) for k, (seen, r) in self._replicas.items() if now - seen < self.stale_s}
        if self._desired is None:
            return
        waiting = [r for pending in self._pending().values() for r in pending] if now >= self._publish_from else []
        old, routes = self.table.routes, self._target(frozenset(r.digest for r in waiting if self._is_ready(r)))
        back = {
            route: rollback for route, rollback in self.table.rolled_back.items()
            if route in routes and self._holds(route, rollback)
        }  # fmt: skip
        if (routes, back) != (old, self.table.rolled_back):
            self._publish(routes, back)
        for route, shares in routes.items():
            if old.get(route) and old[route][0][0] != shares[0][0]:
                self._watch(route, shares[0][0], old[route][0][0], now)
            canary = self._desired.canaries.get(route)
            if canary and len(shares) > 1 and (route, canary.key) not in self._trials:
                self._watch(route, canary.release.digest, shares[0][0], now, canary.key)

    def _is_ready(self, release: Release) -> bool:
        """Whether every live engine of its pool has prepared it; of a pool's first, whether each that can has."""
        pool, digest = self._pool_of(release), release.digest
        engines = self._engines(pool)
        lacking = [engine for engine in engines if digest not in engine.prepared]
        if self._served(pool):
            return bool(engines) and not lacking
        return len(lacking) < len(engines) and all(digest in engine.failed for engine in lacking)

    def _holds(self, route: str, rollback: Rollback) -> bool:
        """Whether what was rolled back stays so: until its alias moves, or another canary is started."""
        assert self._desired is not None
        release, canary = self._desired.routes.get(route), self._desired.canaries.get(route)
        if rollback.canary and canary and canary.key != rollback.canary:
            return False
        return release is None or release.digest == (rollback.champion or rollback.digest)

    def _publish(self, routes: Mapping[str, Shares], back: Mapping[str, Rollback]) -> None:
        """A new table. Versions that answer are kept, and of every route the champion before."""
        old, before = self.table, {k: v for k, v in self.table.before.items() if k in routes}
        for route, shares in routes.items():
            if route in old.routes and old.routes[route][0][0] != shares[0][0]:
                before[route] = old.routes[route][0][0]
        table = Table(generation=old.generation + 1, routes=routes, before=before, rolled_back=back)
        new = [release for pending in self._pending().values() for release in pending]
        known = {**old.versions, **{release.digest: release for release in new}}
        keep = table.routed.union(before.values())
        self.table = replace(table, versions={d: release for d, release in known.items() if d in keep})
        told = ", ".join(f"{route} -> {self._told(shares)}" for route, shares in sorted(routes.items()))
        log.info("table %d: %s", self.table.generation, told)

    def _told(self, shares: Shares) -> str:
        champion, *canaries = (f"{self.table.versions[digest]}" for digest, _ in shares)
        return champion + "".join(f" and {100 * shares[1][1]:g} % {canary}" for canary in canaries)


# --- the registry -----------------------------------------------------------------------------------------------


def read_desired(
    registry: Registry, models: tuple[str, ...], gated: Callable[[str, str, str], bool] | None = None
) -> Desired:
    """Ask the registry. `models`: "name@alias", with `*` in the name for any that has the alias.

    gated: did this digest of this name pass the gate for this alias? None: an alias is followed in any case.
    A canary must have passed it for the alias that it shares, or for `challenger`.
    Raises: UnavailableError when it does not answer.
    """
    refused: dict[str, str] = {}

    def resolved(reference: str, *gates: str) -> Version | None:
        try:
            version = registry.resolve(reference)
        except MissingError:
            return None
        except ConfigError as error:  # another tool's version, or a malformed reference
            refused[reference] = str(error)
            return None
        if gated is not None and not any(gated(version.name, version.digest, gate) for gate in gates):
            remedy = f"`rayscale promote {version} --alias {gates[-1]}`"
            refused[reference] = f"{version} passed no gate for {gates[-1]}, and require_gate is set; {remedy}"
            return None
        return version

    routes: dict[str, Release] = {}
    canaries: dict[str, Canary] = {}
    over: list[Ending] = []
    standing = registry.standing()
    for pattern in models:
        name_pattern, _, alias = route_of(pattern).partition("@")
        is_pattern = any(c in name_pattern for c in "*?[")
        for name in fnmatch.filter(standing, name_pattern) if is_pattern else [name_pattern]:
            route, beside = f"{name}@{alias}", f"{name}@{alias_of(alias)}"
            stands = standing.get(name, {})
            if alias not in stands or not (champion := resolved(route, alias)):
                continue
            routes[route] = _release(champion)
            if alias_of(alias) not in stands or not (version := resolved(beside, alias, "challenger")):
                continue
            try:
                found = _canary(route, champion, version)
            except ConfigError as error:
                refused[beside] = str(error)
                continue
            if isinstance(found, Ending):
                over.append(found)
            else:
                canaries[route] = found
    names = frozenset(standing)
    return Desired(routes=routes, refused=refused, names=names, canaries=canaries, over=tuple(over))


def _release(version: Version) -> Release:
    return Release(name=version.name, version=version.version, digest=version.digest, uri=version.uri)


def _canary(route: str, champion: Version, version: Version) -> Canary | Ending:
    """What the registry says of a canary. Raises: ConfigError where it says nothing that can be followed."""
    asked = read_share(version, route.partition("@")[2])
    if why := asked.over(champion.version, version.version):
        return Ending(route=route, release=_release(version), why=why, canary=asked.since)
    return Canary(release=_release(version), weight=asked.weight / 100, key=asked.since)


def write_ending(registry: Registry, ending: Ending) -> None:
    """Tell the registry what ended here: a canary's alias goes, a champion's stays. Raises: UnavailableError."""
    alias, release, why = ending.route.partition("@")[2], ending.release, ending.why
    try:
        if ending.canary:
            decision = ROLLED_BACK if ending.instead else OVER
            number, since = release.version, ending.canary
            end(registry, release.name, alias, decision=decision, why=why, version=number, since=since)
        elif ending.instead:
            write_taken_back(registry, str(release), alias, to=ending.instead.version, why=why)
    except UnavailableError:
        raise
    except RayscaleError as error:  # moved or deleted by somebody else meanwhile: the next look tells
        log.warning("%s: %s", ending.route, error)
