"""`ledger.json` in a run's folder: the photos that could not be read, and another one stood in for."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rayscale.errors import DamageError, MissingError
from rayscale.observe import log
from rayscale.storage import join, open_store


class Ledger:
    """The damaged photos of a run, over all its starts; more than its budget stop it."""

    def __init__(self, run_uri: str, num_images: int, budget: float) -> None:
        self._store, self._num_images, self._budget = open_store(run_uri), num_images, budget
        try:
            self.damaged: dict[str, str] = json.loads(self._store.read("ledger.json"))  # key -> reason
        except MissingError:
            self.damaged = {}

    def add(self, found: Mapping[str, str]) -> None:
        """Keep what was found. Raises: DamageError where the whole is beyond the budget."""
        new = {key: reason for key, reason in found.items() if key not in self.damaged}
        if new:
            self.damaged |= new
            self._store.write("ledger.json", json.dumps(self.damaged, indent=1, sort_keys=True).encode())
            for key, reason in new.items():
                log.warning("photo %s is damaged (%s); another one stands in for it", key, reason)
        if len(self.damaged) > self._budget * self._num_images:
            where = join(self._store.uri, "ledger.json")
            rule = f"{len(self.damaged)} of {self._num_images} photos are damaged, see {where}"
            remedy = "mend the dataset with `rayscale data repair`, or raise the budget"
            raise DamageError("run.damage_budget", self._budget, rule, remedy)
