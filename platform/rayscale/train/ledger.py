"""`ledger.json` in a run's folder: photos that could not be read, and that others stood in for."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rayscale.errors import DamageError, UnavailableError
from rayscale.observe import log
from rayscale.storage import join, open_store


class Ledger:
    """Keeps what was damaged over all starts of a run; more than its budget since this start stop the run.

    The file remembers, but only this start counts: after a repair the same command goes on.
    """

    def __init__(self, run_uri: str, num_images: int, budget: float) -> None:
        self._store, self._num_images, self._budget = open_store(run_uri), num_images, budget
        self._found: dict[str, str] = {}  # key -> reason, since this start
        self._kept = True  # all of it is in the file

    @property
    def num_found(self) -> int:
        """Photos since this start."""
        return len(self._found)

    def add(self, found: Mapping[str, str]) -> None:
        """Keep what was found. Raises: DamageError where this start found more than the budget."""
        for key in sorted(found.keys() - self._found.keys()):
            log.warning("photo %s is damaged (%s); another one stands in for it", key, found[key])
            self._kept = False
        self._found |= found
        where = join(self._store.uri, "ledger.json")
        if not self._kept:
            try:
                before = json.loads(self._store.read("ledger.json")) if self._store.exists("ledger.json") else {}
                self._store.write("ledger.json", json.dumps(before | self._found, indent=1, sort_keys=True).encode())
                self._kept = True
            except UnavailableError as error:  # it goes in with the next
                log.warning("%s is not written: %s", where, error)
        if len(self._found) > self._budget * self._num_images:
            rule = f"{len(self._found)} of {self._num_images} photos are damaged, see {where}"
            remedy = "mend the dataset with `rayscale data repair`, or give --name, --rebase and a larger budget"
            raise DamageError("run.damage_budget", self._budget, rule, remedy)
