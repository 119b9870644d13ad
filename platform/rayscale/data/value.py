"""What operators and augmentations have in common: they are plain values that check themselves."""

from __future__ import annotations

import functools
import math
import typing
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic

from rayscale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Value:
    """A plain value in a recipe. Unknown fields are refused where it is read from JSON."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        kind = typing.cast(typing.Hashable, type(self))
        for name, hint in _hints(kind).items():  # 1 and 1.0 are one value, so they must have one digest
            value = getattr(self, name)
            if hint is float:
                object.__setattr__(self, name, float(value))
            elif float in typing.get_args(hint):
                object.__setattr__(self, name, tuple(float(v) for v in value))
        self._check()

    def _check(self) -> None:
        """Raises: ConfigError for a field that makes no sense."""

    def _require(self, field: str, good: bool, rule: str, remedy: str) -> None:
        if not good:
            name = getattr(self, "name", type(self).__name__)
            raise ConfigError(f"{name}.{field}", getattr(self, field), rule, remedy)

    def _range(self, field: str, least: float, most: float = math.inf) -> None:
        low, high = getattr(self, field)
        rule = f"must be (low, high) with {least:g} <= low <= high" + (f" <= {most:g}" if most < math.inf else "")
        self._require(field, least <= low <= high <= most, rule, "give both ends, the lower first")

    def _probability(self, *fields: str) -> None:
        for field in fields:
            self._require(field, 0 <= getattr(self, field) <= 1, "must be a probability, 0..1", "try 0.5")


@functools.cache
def _hints(kind: typing.Hashable) -> dict[str, Any]:
    return typing.get_type_hints(kind)
