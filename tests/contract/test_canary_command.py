"""`rayscale models canary` on a real registry, and what serving reads and writes there."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from rayscale.cli.canary import canary
from rayscale.cli.models import history
from rayscale.errors import ConfigError, ConflictError, MissingError, RayscaleError, UnavailableError
from rayscale.registry.canary import end, read_share
from rayscale.registry.journal import PROMOTE, Journal
from rayscale.registry.models import Registry
from rayscale.serve.batching import Outcome
from rayscale.serve.rollout import Canary, Ending, Report, Rollout, read_desired, write_ending

small = runpy.run_path(str(Path(__file__).parents[1] / "small_onnx.py"))
ROUTE = "photos@champion"


@pytest.fixture
def registry(mlflow_home: Path, tmp_path: Path) -> Registry:
    """photos:1, the champion, and photos:2."""
    registry = Registry()
    for seed in (1, 2):
        small["write"](tmp_path / f"artifact-{seed}", seed)
        registry.publish("photos", tmp_path / f"artifact-{seed}")
    promote(registry, 1)
    return registry


def promote(registry: Registry, version: int) -> None:
    before, to = registry.aliases("photos").get("champion"), registry.resolve(f"photos:{version}")
    Journal(registry, "photos").move("champion", to, before=before, decision=PROMOTE)


def recorded() -> list[tuple[str, int | None, int | None, str]]:
    """The moves beside the champion's alias."""
    moves = [m for m in history("photos")["moves"] if m["decision"] != PROMOTE]
    return [(m["decision"], m["before"], m["version"], m["reason"]) for m in moves]


def test_a_canary_is_started_raised_and_stopped_and_all_of_it_is_recorded(registry: Registry) -> None:
    made = canary("photos:2", weight=5, for_s=600, reason="sharper skies")
    assert (made["version"], made["alias"], made["weight"], made["champion"]) == (2, "champion", 5, 1)
    assert registry.aliases("photos") == {"champion": 1, "champion-canary": 2}
    version = registry.resolve("photos:2")
    found = read_desired(registry, ("*@champion",))
    (wanted,) = found.canaries.values()
    assert (wanted.release.version, wanted.release.digest, wanted.weight) == (2, version.digest, 0.05)
    assert (wanted.key, found.names, found.over, found.refused) == (made["since"], {"photos"}, (), {})
    raised = canary("photos:2", weight=20)
    assert (raised["since"], raised["until"]) == (made["since"], made["until"])  # its trial goes on
    assert read_desired(registry, ("*@champion",)).canaries[ROUTE] == replace(wanted, weight=0.2)
    with pytest.raises(MissingError, match="photos:1 is no canary"):
        canary("photos:1", stop=True)
    assert canary("photos", weight=0, reason="seen enough")["version"] == 2
    assert registry.aliases("photos") == {"champion": 1}
    assert read_desired(registry, ("*@champion",)).canaries == {}
    with pytest.raises(MissingError, match="is no canary"):
        canary("photos", stop=True)
    assert recorded() == [
        ("canary", None, 2, "5 % of the requests: sharper skies"),
        ("canary", 2, 2, "20 % of the requests"),
        ("canary stopped", 2, None, "seen enough"),
    ]
    assert history("photos")["moved_by_hand"] == {}
    assert canary("photos:2", weight=5)["since"] > made["since"]  # started anew


def test_what_cannot_be_a_canary_is_refused_and_moves_nothing(registry: Registry, tmp_path: Path) -> None:
    wrong: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
        (ConfigError, "give a share, or --stop alone", "photos:2", {}),
        (ConfigError, "give a share, or --stop alone", "photos:2", {"weight": 5, "stop": True}),
        (ConfigError, "less than 100 percent", "photos:2", {"weight": 100}),
        (ConfigError, "less than 100 percent", "photos:2", {"weight": -1}),
        (ConfigError, "must name a version", "photos", {"weight": 5}),
        (ConfigError, "points at already", "photos:1", {"weight": 5}),
        (MissingError, "needs a version beside it", "photos:2", {"weight": 5, "alias": "challenger"}),
        (MissingError, "no such version", "photos:9", {"weight": 5}),
        (MissingError, "no such model", "phots", {"stop": True}),
    ]
    for error, says, model, options in wrong:
        with pytest.raises(error, match=says):
            canary(model, **options)
    small["write"](tmp_path / "align", 3)
    other = registry.publish("photos", tmp_path / "align")
    registry.client.set_model_version_tag("photos", str(other.version), "scale", "4")
    with pytest.raises(ConfigError, match="its scale is 4, that of photos:1 is 2"):
        canary("photos:3", weight=5)
    assert registry.aliases("photos") == {"champion": 1}
    assert recorded() == []


@pytest.mark.parametrize("error", [ConflictError, UnavailableError])
def test_a_command_that_is_refused_changes_no_share(
    error: type[RayscaleError], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error("alias", "photos@champion-canary", "somebody else is moving it", "try again")

    def wanted() -> dict[str, float]:
        found = read_desired(registry, ("*@champion",))
        return {str(one.release): one.weight for one in found.canaries.values()}

    canary("photos:2", weight=10)
    assert wanted() == {"photos:2": 0.1}
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "move", refused)
        with pytest.raises(error):
            canary("photos:2", weight=90)
    assert wanted() == {"photos:2": 0.1}
    assert canary("photos:2", weight=90)["weight"] == 90  # control
    assert wanted() == {"photos:2": 0.9}

    canary("photos", stop=True)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "move", refused)
        with pytest.raises(error):
            canary("photos:2", weight=20)
    registry.client.set_registered_model_alias("photos", "champion-canary", "2")  # by hand, later
    assert wanted() == {}
    assert canary("photos:2", weight=20)["weight"] == 20
    assert wanted() == {"photos:2": 0.2}


def test_a_start_that_dies_after_its_move_leaves_no_share_of_a_former_trial(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def died(*_: object) -> None:
        raise Died

    first = canary("photos:2", weight=80)
    canary("photos", stop=True)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_model_version_tag", died)
        with pytest.raises(Died):
            canary("photos:2", weight=5)
    found = read_desired(registry, ("*@champion",))
    assert (registry.aliases("photos")["champion-canary"], found.canaries) == (2, {})
    assert "was set by hand" in found.refused["photos@champion-canary"]
    again = canary("photos:2", weight=5)  # control: the command again completes it
    assert read_desired(registry, ("*@champion",)).canaries[ROUTE].weight == 0.05
    assert again["since"] > first["since"]


def test_serving_ends_a_canary_by_itself_and_says_why(registry: Registry) -> None:
    canary("photos:2", weight=50)
    state = Rollout(now=0.0)
    prepared = frozenset(registry.resolve(f"photos:{v}").digest for v in (1, 2))
    bad = registry.resolve("photos:2").digest

    def poll(failed: int = 0) -> dict[str, float]:
        """What the Rollout's process does every second; the shares that are served then."""
        state.desire(read_desired(registry, ("*@champion",)), 0.0)
        state.sync(Report(replica="e", prepared=prepared, outcomes={bad: Outcome(20, failed)}), 0.0)
        while state.endings:
            write_ending(registry, state.endings.pop(0))
        return dict(state.table.routes[ROUTE])

    poll()
    assert poll()[bad] == 0.5
    assert bad not in poll(failed=6)
    assert registry.aliases("photos") == {"champion": 1}
    assert recorded()[1:] == [("canary rolled back", 2, None, "6 of 6 runs failed")]
    assert bad not in poll(failed=6)
    assert "canary photos:2 was rolled back" in state.held()[ROUTE]
    canary("photos:2", weight=5)
    assert poll(failed=6)[bad] == 0.05
    promote(registry, 2)
    assert poll(failed=6) == {bad: 1.0}
    assert registry.aliases("photos") == {"champion": 2}
    assert recorded()[3:] == [("canary over", 2, None, "it was promoted to 2")]
    assert bad not in poll(failed=99)  # its probation: the alias stays where it was put
    assert registry.aliases("photos") == {"champion": 2}
    assert recorded()[4:] == [("rolled back in serving", 2, 1, "93 of 93 runs failed")]
    assert bad not in poll(failed=99)
    assert len(recorded()) == 5


def test_another_canary_than_the_one_that_ended_stays(registry: Registry) -> None:
    first = canary("photos:2", weight=5)
    canary("photos", stop=True)
    second = canary("photos:2", weight=5)
    found = read_desired(registry, ("*@champion",)).canaries[ROUTE]
    assert isinstance(found, Canary)
    late = Ending(route=ROUTE, release=found.release, why="its time is up", canary=first["since"])
    write_ending(registry, late)
    assert registry.aliases("photos")["champion-canary"] == 2
    assert read_share(registry.resolve("photos:2"), "champion").since == second["since"]
    registry.client.delete_registered_model_alias("photos", "champion-canary")  # in MLflow's own page
    assert read_desired(registry, ("*@champion",)).canaries == {}
    assert end(registry, "photos", "champion", decision="x", why="") is None
