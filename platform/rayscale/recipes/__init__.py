"""A recipe is a public function without arguments annotated `-> Recipe`; this folder is the registry.

`module:function` names it: `rayscale.recipes.compact:demo`, or one in the user's own working directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from rayscale.contract import digest, to_json
from rayscale.data.plan import DataSettings
from rayscale.errors import ConfigError, nearest
from rayscale.registry.gate import Gate
from rayscale.task import Task
from rayscale.train.loop import RunSettings


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a run, complete: a variant is `dataclasses.replace(base(), ...)`."""

    task: Task
    data: DataSettings = DataSettings()
    run: RunSettings = RunSettings()
    gate: Gate = Gate()


def discover() -> dict[str, Callable[[], Recipe]]:
    """Every recipe of this package: `rayscale.recipes.MODULE:FUNCTION` -> the function."""
    found: dict[str, Callable[[], Recipe]] = {}
    for info in pkgutil.iter_modules(__path__):
        found |= _recipes_of(importlib.import_module(f"{__name__}.{info.name}"))
    return found


def load(reference: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe `module:function`, with `path=value` overrides applied in order.

    Raises: ConfigError for an unknown recipe or path (with the nearest known), or a value of the wrong type.
    """
    module, separator, function = reference.partition(":")
    known = discover()
    if reference not in known:
        if str(Path.cwd()) not in sys.path:  # recipes of the user's own working directory
            sys.path.insert(0, str(Path.cwd()))
        try:
            found = _recipes_of(importlib.import_module(module)) if separator and function else {}
        except ModuleNotFoundError as error:
            if module != error.name and not module.startswith(f"{error.name}."):
                raise  # the module is there, something that it imports is not
            found = {}
        if reference not in found:
            raise ConfigError(
                "--recipe", reference, "no such recipe (module:function)", nearest(reference, known | found)
            )
        known |= found
    recipe = known[reference]()
    return override(recipe, overrides)


def _recipes_of(module: types.ModuleType) -> dict[str, Callable[[], Recipe]]:
    return {
        f"{module.__name__}:{name}": fn
        for name, fn in inspect.getmembers(module, inspect.isfunction)
        if fn.__module__ == module.__name__
        and not name.startswith("_")
        and not inspect.signature(fn).parameters
        and typing.get_type_hints(fn).get("return") is Recipe
    }


def override(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """Apply `path=value` settings, e.g. `run.total_images=8000`, typed by the fields they name.

    All at once, so that settings which only fit together can be changed together; of two for one path the later wins.
    """
    tree: dict[str, Any] = {}
    for given in overrides:
        path, separator, value = given.partition("=")
        if not separator:
            raise ConfigError("--set", given, "must be path=value", "e.g. --set run.total_images=8000")
        node: Any = recipe
        *parents, last = parts = path.strip().split(".")
        for part in parts:
            if not dataclasses.is_dataclass(node) or part not in {f.name for f in dataclasses.fields(node)}:
                raise ConfigError("--set", path, "no such path in this recipe", _nearest_path(path, recipe))
            owner, node = node, getattr(node, part)
        if dataclasses.is_dataclass(node):
            raise ConfigError("--set", path, "is a group of settings", _nearest_path(f"{path}.", recipe))
        branch = tree
        for part in parents:
            branch = branch.setdefault(part, {})
        hints = typing.get_type_hints(type(owner), include_extras=True)  # with what tells the values of a union apart
        branch[last] = _typed(hints[last], value.strip(), path)
    return typing.cast(Recipe, _replaced(recipe, tree))


def _replaced(node: Any, tree: dict[str, Any]) -> Any:
    """`node` with the leaves of `tree` in place of its own."""
    changes = {
        name: _replaced(getattr(node, name), value) if dataclasses.is_dataclass(getattr(node, name)) else value
        for name, value in tree.items()
    }
    return dataclasses.replace(node, **changes)


def _nearest_path(path: str, recipe: Recipe) -> str:
    close = difflib.get_close_matches(path, [known for known, _ in paths(recipe)], n=1, cutoff=0.4)
    return f"did you mean '{close[0]}'?" if close else "see --dry-run for all paths"


def _typed(hint: Any, value: str, path: str) -> Any:
    adapter = pydantic.TypeAdapter(hint)
    try:
        if value.lower() in ("none", "null") and type(None) in typing.get_args(hint):
            return None
        if value[:1] in "[{":
            return adapter.validate_json(value)
        return adapter.validate_strings(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])  # within a value that is a list or an object
        rule = f"{where}: {first['msg']}" if where else first["msg"]
        raise ConfigError(
            f"--set {path}", value, rule, f"give a value of type {getattr(hint, '__name__', hint)}"
        ) from None


def paths(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every settable path of a recipe with its value, depth first."""
    found: list[tuple[str, Any]] = []
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            found += paths(value, f"{prefix}{f.name}.")
        else:
            found.append((f"{prefix}{f.name}", value))
    return found


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as plain JSON values, the task's class named, and that of each setting within it that could
    be of another one (a generator, an architecture); what a run is identified by.

    A family outside this package is named with a digest of its source: an edited one is another recipe.
    """
    task = type(recipe.task)
    named = {"task_type": _name(task)} | _chosen_types(recipe.task, "task")
    if task.__module__.partition(".")[0] != __name__.partition(".")[0]:
        named["task_source"] = digest(inspect.getsource(sys.modules[task.__module__]))
    return {**named, **to_json(recipe)}


def _chosen_types(node: Any, path: str) -> dict[str, str]:
    found: dict[str, str] = {}
    hints = typing.get_type_hints(type(node))
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            if hints[f.name] is not type(value):
                found[f"{path}.{f.name}_type"] = _name(type(value))
            found |= _chosen_types(value, f"{path}.{f.name}")
    return found


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
