"""Promoters that race for an alias, on any registry; `runpy.run_path` loads it: test folders are no packages."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rayscale.errors import RayscaleError
from rayscale.registry.journal import INTENT, PROMOTE, Entry, Journal, chain
from rayscale.registry.models import Registry, Version


def model(registry: Registry, name: str) -> list[Version]:
    """A model with three versions, as far as the registry knows them; index 0 stands for none."""
    registry.client.create_registered_model(name)
    found = [Version(name=name, version=n, digest=f"{n}" * 64, uri="", run_id="") for n in range(4)]
    for one in found[1:]:
        registry.client.create_model_version(name, f"s3://m/{one}", tags={"digest": one.digest}, await_creation_for=0)
    return found


def agreed(registry: Registry, name: str, alias: str = "champion") -> tuple[Entry, ...]:
    """The next command; then alias and journal say the same."""
    stood = registry.aliases(name).get(alias)
    book = Journal(registry, name, patience_s=0.0)  # who was at it is dead
    last, stands = book.heal(alias)
    assert registry.aliases(name).get(alias) == stood == stands
    counted = chain(book.read(), alias)
    if last is not None:
        assert (counted[-1], last.stands) == (last, stands)
        assert last.kind != INTENT
    return counted


def raced(
    registry: Registry, versions: list[Version], before: int | None, pool: ThreadPoolExecutor, alias: str = "champion"
) -> list[Any]:
    """Two promoters at once, to the two versions that do not hold the alias; what each was told."""
    start = threading.Barrier(2)

    def promoter(to: Version) -> Any:
        book = Journal(Registry(registry.uri), to.name, patience_s=120.0)
        start.wait()
        try:
            return book.move(alias, to, before=before, decision=PROMOTE, why=f"to {to.version}")
        except RayscaleError as error:
            return error

    return list(pool.map(promoter, [v for v in versions[1:] if v.version != (before or 1)]))
