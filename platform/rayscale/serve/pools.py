"""Pools: engines that share a set of models, each a deployment of its own that scales by itself, also to none.

Which model belongs where is a function of its name; models that no pool names are those of the pool "". The rollout
applies it, and tells gateways what each pool can answer with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

from rayscale.errors import ConfigError, nearest
from rayscale.serve.batching import F32, U8, Known, Outcome, Place, Timing
from rayscale.serve.course import Begin, Look, Then
from rayscale.serve.threads import Threads

if TYPE_CHECKING:
    from rayscale.serve.engine import EngineSettings
    from rayscale.serve.remote import RemoteEngine

T = TypeVar("T")

Pools = Mapping[str, tuple[str, ...]]
"""Pool -> its models, `*` in a name for any letters. The first pool that names a model has it."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,29}")


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A pool as gateways need to know it."""

    num_engines: int = 0
    digests: frozenset[str] = frozenset()  # all that its engines are to have
    known: Mapping[str, Known] = field(default_factory=dict)  # what they have, or had before all of them slept
    failed: Mapping[str, str] = field(default_factory=dict)  # digest -> why none of them has it


def pool_of(name: str, pools: Pools) -> str:
    """The pool of a model."""
    return next((pool for pool, models in pools.items() if any(fnmatchcase(name, m) for m in models)), "")


def deployment_of(pool: str) -> str:
    """The name of its engines in `deployments:`."""
    return f"Engine-{pool}" if pool else "Engine"


def check_pools(pools: Pools, models: Sequence[str]) -> None:
    """`models`: what is served, "name@alias". Raises: ConfigError for pools that could not be meant."""
    names = {model.partition("@")[0] for model in models}
    for pool, patterns in pools.items():
        where = f"args.engines.pools.{pool}"
        if not _NAME.fullmatch(pool):
            rule = "a pool's name is at most 30 small letters, digits and dashes"
            raise ConfigError("args.engines.pools", pool, rule, "its deployment is Engine-NAME")
        if not patterns:
            raise ConfigError(where, list(patterns), "has no models", "name some, or leave the pool out")
        for pattern in patterns:
            if "@" in pattern or ":" in pattern:
                rule = "is no model's name: all versions of a model share a pool"
                raise ConfigError(where, pattern, rule, f"say {re.split('[@:]', pattern)[0]}")
            if not any(_meet(pattern, name) for name in names):
                raise ConfigError(where, pattern, "is not among args.models", nearest(pattern, names))
    for (pool, patterns), (other, others) in combinations(pools.items(), 2):
        if both := [p for p in patterns if any(_meet(p, o) for o in others)]:
            rule = f"its models are in the pool {other} too"
            raise ConfigError(f"args.engines.pools.{pool}", both[0], rule, "name each model in one pool")


def _meet(a: str, b: str) -> bool:
    """Whether one of two patterns holds the other one."""
    return fnmatchcase(a, b) or fnmatchcase(b, a)


class PooledEngine:
    """`engine.Runner` over the engines of all pools: each model is asked of its own."""

    def __init__(self, pools: Mapping[str, RemoteEngine]) -> None:
        """`pools`: at least the one that is called ""."""
        self._pools, self._default = pools, pools[""]
        self._by_digest: dict[str, RemoteEngine] = {}

    def learn(self, pools: Mapping[str, Pool]) -> None:
        """What every pool has now. One that sleeps and is to have something new is woken."""
        for name, engine in self._pools.items():
            pool = pools.get(name, Pool())
            engine.learn(pool.known, pool.num_engines)
            self._by_digest |= dict.fromkeys(pool.known, engine)
            if not pool.num_engines and pool.digests - pool.known.keys():
                engine.wake()

    def of(self, digest: str) -> RemoteEngine:
        """Those that run a model."""
        return self._by_digest.get(digest, self._default)

    # of all of them

    @property
    def settings(self) -> EngineSettings:
        return self._default.settings

    @property
    def digests(self) -> frozenset[str]:
        return frozenset().union(*(engine.digests for engine in self._pools.values()))

    def known(self) -> dict[str, Known]:
        return {digest: known for engine in self._pools.values() for digest, known in engine.known().items()}

    def outcomes(self) -> dict[str, Outcome]:
        return {digest: count for engine in self._pools.values() for digest, count in engine.outcomes().items()}

    def forget(self, digest: str) -> None:
        self._by_digest.pop(digest, None)
        for engine in self._pools.values():
            engine.forget(digest)

    def close(self) -> None:
        for engine in self._pools.values():
            engine.close()

    # of those that run the model

    def session(self, digest: str) -> Known:
        return self.of(digest).session(digest)

    def cost_s(self, digest: str, units: int) -> float:
        return self.of(digest).cost_s(digest, units)

    async def run(self, digest: str, tiles: Sequence[U8], place: Place, *, deadline: float) -> Timing:
        return await self.of(digest).run(digest, tiles, place, deadline=deadline)

    async def run_between(
        self, digest: str, pool: Threads, begin: Begin, then: Then[T], *, deadline: float, look: Look | None = None
    ) -> T | None:
        return await self.of(digest).run_between(digest, pool, begin, then, deadline=deadline, look=look)

    async def call(
        self, digest: str, inputs: Mapping[str, F32], *, deadline: float, owner: str = ""
    ) -> tuple[dict[str, F32], Timing]:
        return await self.of(digest).call(digest, inputs, deadline=deadline, owner=owner)
