"""`rayscale models canary`: give a version a share of the requests to an alias, and take it away again."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rayscale import artifact
from rayscale.errors import ConfigError, MissingError
from rayscale.observe import log
from rayscale.registry.canary import STOPPED, alias_of, check_weight, end, start
from rayscale.registry.models import CHAMPION, Registry, check_alias
from rayscale.storage import home


def canary(
    model: Annotated[str, typer.Argument(help="NAME:VERSION; to stop it, NAME is enough")],
    weight: Annotated[
        float | None, typer.Option(help="Percent of the requests; 0: as --stop", show_default=False)
    ] = None,
    alias: Annotated[str, typer.Option(help="The alias whose requests it shares")] = CHAMPION,
    for_s: Annotated[
        float | None,
        typer.Option(
            "--for", min=0, help="Seconds until it ends by itself; 0: never", show_default="as it was, or never"
        ),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Take its share away")] = False,
    reason: Annotated[str, typer.Option(help="Why: it is kept with the move")] = "",
) -> dict[str, Any]:
    """Try a version out on a share of the requests to an alias: what serves follows within seconds.

    Who meets it is decided by the bearer key, or without keys by the request id, so that one client meets one
    version; a larger share takes clients from the champion alone. It ends when the version is promoted or the alias
    moves otherwise, after `--for`, by `--stop`, or by itself where it does worse than the champion beside it: five
    runs or more failed, and a tenth more of all than of the champion's, or its runs take twice as long.
    """
    check_alias(alias)
    if (weight is None) != stop:
        raise ConfigError("--weight", weight, "give a share, or --stop alone", "e.g. --weight 5")
    registry = Registry()
    name = model.partition(":")[0]
    if stop or weight == 0:
        return _stop(registry, name, model, alias, reason)
    assert weight is not None
    check_weight(weight)
    if ":" not in model:
        raise ConfigError("model", model, "must name a version", f"e.g. {name}:2")
    version = registry.resolve(model)
    artifact.load(registry.fetch(version, home() / "cache" / "artifacts"), expect_digest=version.digest)
    why = f"{weight:g} % of the requests" + (f": {reason.strip()}" if reason.strip() else "")
    share = start(registry, version, alias, weight=weight, for_s=for_s, why=why)
    log.info("%s is to answer %g %% of the requests to %s, beside version %d", version, weight, alias, share.champion)
    return {"model": name, "version": version.version, "digest": version.digest, "alias": alias, "weight": weight,
            "champion": share.champion, "since": share.since, "until": share.until or None}  # fmt: skip


def _stop(registry: Registry, name: str, model: str, alias: str, reason: str) -> dict[str, Any]:
    registry.versions(name)  # a wrong name is told
    wanted = registry.resolve(model).version if ":" in model else 0
    ended = end(registry, name, alias, decision=STOPPED, why=reason.strip(), version=wanted)
    if ended is None:
        raise MissingError("alias", f"{name}@{alias_of(alias)}", f"{model} is no canary", "see `rayscale models list`")
    return {"model": name, "version": ended.version, "digest": ended.digest, "alias": alias, "weight": 0}
