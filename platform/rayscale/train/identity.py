"""Run identity: a run is a name under the storage URI. The same command resumes it, whoever killed it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from rayscale.contract import digest
from rayscale.errors import ConfigError, ConflictError
from rayscale.observe import log
from rayscale.storage import join, open_store
from rayscale.tracking import without_password
from rayscale.train.record import RunRecord, open_run


def default_name(recipe: str, recipe_digest: str, manifest_digest: str) -> str:
    """`compact-demo-1a2b3c4d`: the recipe's name and a digest of recipe and data."""
    module, _, function = recipe.partition(":")
    return f"{module.rpartition('.')[2]}-{function}-{digest([recipe_digest, manifest_digest])[:8]}"


def claim(wanted: RunRecord, *, new: bool = False, rebase: bool = False) -> RunRecord:
    """The run to go on with: the one under `wanted.uri`, or `wanted` itself where there is none.

    `new` takes a free name beside it (or goes on with the one that it took before and that is not finished);
    `rebase` goes on from the old weights with the edited recipe or data.

    Raises: ConfigError where the run there has another recipe or other data, naming the differences.
    """
    if new and rebase:
        raise ConfigError("--rebase", "with --new", "a new run has no weights to go on from", "take one of them")
    if not open_store(wanted.uri).exists("run.json"):
        if rebase:
            remedy = "name the run with --name: by default an edited recipe has a name of its own"
            raise ConfigError("--rebase", wanted.name, "there is no such run yet", remedy)
        return wanted
    if new:
        return _beside(wanted)
    found = open_run(wanted.uri)
    edits = differences(found.resolved, wanted.resolved)
    if found.manifest_digest != wanted.manifest_digest:
        edits.append(f"data: {found.manifest_digest[:12]} -> {wanted.manifest_digest[:12]}")
    if found.plan_digest != wanted.plan_digest and not edits:
        edits.append("the order of the data")
    if edits and not rebase:
        raise ConfigError(
            "--name",
            found.name,
            f"this run was started with another recipe or other data ({'; '.join(edits)})",
            "take --new for a run of its own, or --rebase to go on from its weights",
        )
    tracked = without_password(found.tracking_uri)  # an older version may have recorded a user
    if tracked != wanted.tracking_uri:
        raise ConflictError("MLFLOW_TRACKING_URI", wanted.tracking_uri, f"the run is tracked in {tracked}",
                            "set it to that")  # fmt: skip
    if edits:
        log.warning("--rebase: going on from the weights of %s with %s", found.name, "; ".join(edits))
        return dataclasses.replace(wanted, mlflow_run_id=found.mlflow_run_id)
    if found.status != "finished" and found.code_version != wanted.code_version:
        log.warning("run %s was started by code %s, this is %s", found.name, found.code_version, wanted.code_version)
    return dataclasses.replace(found, tracking_uri=tracked)


def _beside(wanted: RunRecord) -> RunRecord:
    """NAME-2, NAME-3, ...: the first that is free, or is the same run and not finished."""
    for number in itertools.count(2):
        named = dataclasses.replace(wanted, name=f"{wanted.name}-{number}", uri=f"{wanted.uri}-{number}")
        if not open_store(named.uri).exists("run.json"):
            return named
        there = open_run(named.uri)
        same = (there.recipe_digest, there.plan_digest) == (wanted.recipe_digest, wanted.plan_digest)
        if same and there.status != "finished":
            return dataclasses.replace(there, tracking_uri=without_password(there.tracking_uri))
    raise AssertionError("unreachable")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`path: old -> new` for every value that differs, in the order of the paths."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        a, b, path = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{path}.")
        elif a != b:
            found.append(f"{path}: {a} -> {b}")
    return found


def run_uri(storage: str, name: str) -> str:
    """Where the run of that name lives, absolute: workers have other working directories.

    Raises: ConfigError for a name that is no single, visible path component.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ConfigError(
            "--name", name, "letters, digits, '_', '-' and '.' only, not first '-' or '.'", "choose another"
        )
    return join(open_store(storage).uri, name)
