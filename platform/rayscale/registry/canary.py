"""Canaries: a version that answers a share of the requests to an alias, before it may answer all of them.

A canary beside ALIAS is an alias of its own, ALIAS-canary, which the journal moves like any other; its version's tag
says how large the share is. Who deletes that alias, in MLflow's own page too, ends it. MLflow is imported where
something is changed only: serving reads this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from rayscale import contract
from rayscale.contract import SCHEMA
from rayscale.errors import ConfigError, MissingError

if TYPE_CHECKING:
    from rayscale.registry.models import Registry, Version

SUFFIX = "-canary"
STARTED, STOPPED, OVER, ROLLED_BACK = "canary", "canary stopped", "canary over", "canary rolled back"
SERVES = "rolled back in serving"


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a canary is to get: the tag `canary.ALIAS` of its version."""

    weight: float  # percent of the requests
    champion: int  # where the alias stood: over once it is seen elsewhere; back before anybody looked, it goes on
    since: str  # UTC, ISO 8601; tells one start from another
    until: str = ""  # "": until something ends it
    schema: int = SCHEMA

    def over(self, champion: int, version: int, now: datetime | None = None) -> str:
        """Why it is over, "" while it is not: where does its alias stand now, is its time up?"""
        if champion == version:
            return f"it was promoted to {champion}"
        if champion != self.champion:
            return f"the alias moved from {self.champion} to {champion}"
        if self.until and (now or datetime.now(UTC)) >= datetime.fromisoformat(self.until):
            return "its time is up"
        return ""


def alias_of(alias: str) -> str:
    """The alias of a canary beside this one."""
    return f"{alias}{SUFFIX}"


def read_share(version: Version, alias: str) -> Share:
    """The share of a canary beside `alias`. Raises: ConfigError where its alias was set by hand."""
    if (text := version.tags.get(_tag(alias))) is None:
        rule = "was set by hand: how large its share is to be, nothing says"
        raise ConfigError("alias", f"{version.name}@{alias_of(alias)}", rule, "start it with `rayscale models canary`")
    share = contract.loads(Share, text, f"tag {_tag(alias)} of {version}")
    check_weight(share.weight)
    return share


def check_weight(weight: float) -> None:
    """Raises: ConfigError for no share and for all."""
    if not 0 < weight < 100:
        rule = "must be more than 0 and less than 100 percent"
        raise ConfigError("--weight", weight, rule, "promote a version that is to answer all")


def start(
    registry: Registry, version: Version, alias: str, *, weight: float, for_s: float | None = None, why: str = ""
) -> Share:
    """Give a version a share, in percent, or another share to the canary that runs, whose trial goes on.

    for_s: until it ends by itself; 0: never; None: as it was, and at first never.
    Raises: MissingError without a champion; ConfigError for a version that is no canary for it; ConflictError.
    """
    from rayscale.registry.journal import Journal
    from rayscale.tracking import answering

    aliases = registry.aliases(version.name)
    if (champion := aliases.get(alias)) is None:
        raise MissingError("alias", f"{version.name}@{alias}", "no such alias: a canary needs a version beside it",
                           "promote one first")  # fmt: skip
    _check(version, registry.resolve(f"{version.name}:{champion}"), alias)
    now = datetime.now(UTC)
    share = Share(weight=weight, champion=champion, since=now.isoformat())
    before = aliases.get(alias_of(alias))
    version = registry.resolve(str(version))  # its tags as they are now: the caller may have downloaded it meanwhile
    running = read_share(version, alias) if before == version.version and _tag(alias) in version.tags else None
    if running is not None and not running.over(champion, version.version):
        share = replace(running, weight=weight)
    elif _tag(alias) in version.tags:  # of a trial that is over: beside the moved alias it would be followed
        with answering(registry.uri):
            registry.client.delete_model_version_tag(version.name, str(version.version), _tag(alias))
    if for_s is not None:
        share = replace(share, until=(now + timedelta(seconds=for_s)).isoformat() if for_s else "")
    journal = Journal(registry, version.name)
    journal.move(alias_of(alias), version, before=before, decision=STARTED, why=why, weight=weight)
    # Last, so that a move that is refused changes no share; without its tag a canary answers nothing.
    with answering(registry.uri):
        tag = contract.dumps(share)
        registry.client.set_model_version_tag(version.name, str(version.version), _tag(alias), tag)
    return share


def end(
    registry: Registry, name: str, alias: str, *, decision: str, why: str, version: int = 0, since: str = ""
) -> Version | None:
    """Take the share of an alias's canary away; None where there is none, or not this one any more.

    `version`, `since`: only if it is still this one, of this start. Raises: ConflictError.
    """
    from rayscale.registry.journal import Journal

    stands = registry.aliases(name).get(alias_of(alias))
    if stands is None or (version and stands != version):
        return None
    found = registry.resolve(f"{name}:{stands}")
    if since and read_share(found, alias).since != since:
        return None
    Journal(registry, name).move(alias_of(alias), None, before=stands, decision=decision, why=why)
    return found


def write_taken_back(registry: Registry, version: str, alias: str, *, to: int, why: str) -> None:
    """Serving does not follow an alias: kept as a run beside the gate's decisions, the alias stays where it is."""
    from rayscale.registry import moves
    from rayscale.tracking import Tracker

    name, _, number = version.partition(":")
    tags = moves.tags(name, to, "", alias, SERVES, int(number)) | {"reason": why}
    Tracker.start(moves.EXPERIMENT, f"{version} -> {to} (serving)", tags=tags, uri=registry.uri).finish()


def _check(version: Version, champion: Version, alias: str) -> None:
    if version.digest == champion.digest:
        rule = f"is what {alias} points at already"
        raise ConfigError("model", version, rule, "name another version")
    for what in ("kind", "scale"):
        mine, theirs = version.tags.get(what), champion.tags.get(what)
        if mine != theirs:
            rule = f"its {what} is {mine}, that of {champion} is {theirs}: who asks for {alias} would see both"
            raise ConfigError("model", version, rule, "name a version that does the same")


def _tag(alias: str) -> str:
    return f"canary.{alias}"
