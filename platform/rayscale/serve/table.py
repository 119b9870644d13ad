"""The routing table: which versions answer for which route, and which of them answers whom. Pure, but for its file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rayscale import contract
from rayscale.errors import MissingError, nearest
from rayscale.storage import Store

Shares = tuple[tuple[str, float], ...]
"""(digest, weight) of a route: the champion first, then its canary; the weights add up to 1."""


def route_of(model: str) -> str:
    """ "name" -> "name@champion"."""
    return model if "@" in model else f"{model}@champion"


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
    """A version that a route does not follow, though its alias points there, or it was to be its canary."""

    digest: str
    why: str
    canary: str = ""  # which one; "": it was the champion
    champion: str = ""  # digest of the version that a canary was beside


@dataclass(frozen=True, kw_only=True)
class Table:
    """Who answers for which route. Versions without a route are to be kept warm."""

    generation: int = 0
    routes: Mapping[str, Shares] = field(default_factory=dict)
    """By "name@alias"."""
    versions: Mapping[str, Release] = field(default_factory=dict)
    """digest -> release."""
    before: Mapping[str, str] = field(default_factory=dict)
    """Route -> digest of its champion before."""
    rolled_back: Mapping[str, Rollback] = field(default_factory=dict)
    """By route, until its alias moves, or another canary is put beside it."""
    schema: int = contract.SCHEMA

    @property
    def routed(self) -> frozenset[str]:
        """Every digest that may be asked to answer."""
        return frozenset(digest for shares in self.routes.values() for digest, _ in shares)

    def pick(self, route: str, draw: float) -> Release:
        """The release that answers a request, by `draw` in [0, 1). Raises: MissingError for an unknown route.

        The champion has the lower draws: more weight for its canary moves draws to that, and none away from it.
        """
        if route not in self.routes:
            raise MissingError("model", route, "is not served here", nearest(route, self.routes))
        for digest, weight in self.routes[route]:
            draw -= weight
            if draw < 0:
                return self.versions[digest]
        return self.versions[self.routes[route][-1][0]]  # the weights' rounding

    def without_canaries(self, loaded: frozenset[str]) -> Table:
        """The same where canaries that are not among `loaded` have no share: a canary holds no replica up."""
        routes = {
            route: shares if loaded.issuperset(dict(shares)) else ((shares[0][0], 1.0),)
            for route, shares in self.routes.items()
        }
        return replace(self, routes=routes)

    def without_late(self, late: frozenset[str], old: Table) -> Table:
        """The same where a route to what is `late` leads where it did in an `old` table, if it was there."""
        routes = {
            route: old.routes.get(route, shares) if late.intersection(dict(shares)) else shares
            for route, shares in self.routes.items()
        }
        return replace(self, routes=routes, versions={**old.versions, **self.versions} if late else self.versions)


def draw(route: str, who: str) -> float:
    """In [0, 1), the same for the same client of a route whenever and wherever it is drawn."""
    digest = hashlib.blake2b(f"{route}\n{who}".encode(errors="backslashreplace"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def read_table(store: Store, key: str) -> Table:
    """The table as it was last kept, an empty one where there is none."""
    return contract.loads(Table, store.read(key), key) if store.exists(key) else Table()


def write_table(store: Store, key: str, table: Table) -> None:
    store.write(key, contract.dumps(table).encode())
