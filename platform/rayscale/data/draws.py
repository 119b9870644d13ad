"""Random draws that are recorded as they are made, and repeated from a record.

An operator asks for every random number by a name. What it was given is kept as plain JSON values, so a sample can be
told, compared and made again: `Chain(rng)` draws, `Chain(None, record)` repeats. A field of noise, too large for a
record, comes from a generator of its own whose seed is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from rayscale.errors import ConfigError

T = TypeVar("T")
Sides = tuple[int, int]
"""Height and width, pixels."""
Drawn = tuple[dict[str, Any], ...]
"""What the operators of a chain drew, in order: `{"name": operator, draw: value, ...}`."""


class Chain:
    """The draws of a sequence of operators. `made` grows as they are asked for."""

    def __init__(self, rng: np.random.Generator | None, past: Sequence[Mapping[str, Any]] | None = None) -> None:
        self._rng, self._past = rng, past
        self.made: list[dict[str, Any]] = []

    @property
    def drawn(self) -> Drawn:
        """All draws so far."""
        return tuple(self.made)

    def next(self, name: str, origin: Sides = (0, 0)) -> Draws:
        """The draws of the next operator. Raises: ConfigError where the record is of another chain."""
        past = None
        if self._past is not None:
            past = self._past[len(self.made)] if len(self.made) < len(self._past) else {"name": "nothing"}
            if past.get("name") != name:
                rule = f"the record goes on with {past.get('name')}"
                raise ConfigError("drawn", name, rule, "replay it with the operators it was made with")
        draws = Draws(name, self._rng, past, origin)
        self.made.append(draws.made)
        return draws


class Draws:
    """The draws of one operator, each under a name of its own. origin: sides of the picture its chain was given."""

    def __init__(
        self, name: str, rng: np.random.Generator | None, past: Mapping[str, Any] | None = None, origin: Sides = (0, 0)
    ) -> None:
        self._rng, self._past, self.origin = rng, past, origin
        self.made: dict[str, Any] = {"name": name}

    def uniform(self, key: str, low: float, high: float) -> float:
        """A float in [low, high)."""
        return self._take(key, lambda rng: float(rng.uniform(low, high)))

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer in low..high, both included."""
        return self._take(key, lambda rng: int(rng.integers(low, high + 1)))

    def chance(self, key: str, probability: float) -> bool:
        """True with that probability."""
        return self._take(key, lambda rng: bool(rng.random() < probability))

    def pick(self, key: str, choices: Sequence[T]) -> T:
        """One of the choices, each as likely; they are plain values."""
        return self._take(key, lambda rng: choices[int(rng.integers(0, len(choices)))])

    def weighted(self, key: str, weights: Sequence[float]) -> int:
        """An index, drawn in proportion to the weights."""
        steps = np.cumsum(weights)
        return self._take(key, lambda rng: int(np.searchsorted(steps, rng.random() * steps[-1], side="right")))

    def order(self, key: str, count: int) -> list[int]:
        """A permutation of range(count)."""
        return self._take(key, lambda rng: [int(i) for i in rng.permutation(count)])

    def field(self) -> np.random.Generator:
        """A generator for whole fields of noise; its seed is what is recorded."""
        seed = self._take("seed", lambda rng: int(rng.integers(0, 1 << 48)))
        return np.random.Generator(np.random.SFC64(seed))  # a quarter faster than Philox

    def chain(self, key: str) -> Chain:
        """The draws of a chain within this operator."""
        chain = Chain(self._rng, None if self._past is None else self._past[key])
        self.made[key] = chain.made
        return chain

    def _take(self, key: str, fresh: Callable[[np.random.Generator], T]) -> T:
        if self._past is None:
            assert self._rng is not None
            value = fresh(self._rng)
        elif key in self._past:
            value = self._past[key]
        else:
            rule = f"the record of {self.made['name']} does not hold it"
            raise ConfigError("drawn", key, rule, "replay it with the operators it was made with")
        self.made[key] = value
        return value
