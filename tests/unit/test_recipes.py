"""Recipes: discovery, overrides, and errors that suggest."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rayscale import recipes
from rayscale.contract import digest
from rayscale.errors import ConfigError
from rayscale.recipes import discover, load, resolved

TINY = "rayscale.recipes.compact:tiny"


def test_every_discovered_recipe_is_complete_and_has_a_docstring() -> None:
    found = discover()
    assert TINY in found
    for name, function in found.items():
        assert function.__doc__, name
        assert resolved(function())["task_type"], name


def test_overrides_are_typed_and_applied_in_order() -> None:
    recipe = load(
        TINY,
        ["run.total_images=999", "task.optimizer.learning_rate=0.5", "data.flips=false", "task.loss_kind=charbonnier",
         "task.clip_norm=none", "run.total_images=1000", "task.optimizer.betas=[0.5, 0.9]"],
    )  # fmt: skip
    assert (recipe.run.total_images, recipe.data.flips) == (1000, False)
    optimizer = recipe.task.optimizer  # type: ignore[attr-defined]
    assert (optimizer.learning_rate, optimizer.betas) == (0.5, (0.5, 0.9))
    assert recipe.task.clip_norm is None  # type: ignore[attr-defined]
    assert digest(resolved(recipe)) != digest(resolved(load(TINY)))
    assert digest(resolved(load(TINY))) == digest(resolved(load(TINY, ["run.seed=0"])))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.total_image=5", r"--set=run\.total_image: no such path.*did you mean 'run\.total_images'\?"),
        ("run.total_images", r"must be path=value"),
        ("run.total_images=many", r"--set run\.total_images=many: .*integer"),
        ("run.precision=fp8", r"--set run\.precision=fp8: .*'fp32' or 'bf16'"),
        ("run.total_images=0", r"run\.total_images=0: must be at least 1"),
        ("data.degradation=5", r"--set data\.degradation=5"),
        ("task=5", r"--set=task: is a group of settings; did you mean"),
        ("run.seed.x=5", r"--set=run\.seed\.x: no such path.*did you mean 'run\.seed'"),
    ],
)
def test_a_wrong_override_is_one_helpful_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(TINY, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", ["rayscale.recipes.compact:demoo", "rayscale.recipes.compct:demo", "demo", "os:path"])
def test_an_unknown_recipe_suggests_the_nearest(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"no such recipe.*(did you mean|choose one of).*rayscale\.recipes\.compact:"):
        load(wrong)


def test_recipes_of_the_users_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_recipes.py").write_text(
        "from rayscale.recipes import Recipe\nfrom rayscale.recipes.compact import tiny\n"
        "def mine() -> Recipe:\n    'Mine.'\n    return tiny()\n"
        "def _hidden() -> Recipe:\n    return tiny()\n"
    )
    assert load("my_recipes:mine") == recipes.compact.tiny()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="did you mean 'my_recipes:mine'"):
        load("my_recipes:_hidden")


def test_a_broken_import_inside_the_users_recipe_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_recipes.py").write_text("import broken_rec\n")  # its name begins like the module's
    with pytest.raises(ModuleNotFoundError, match="broken_rec"):
        load("broken_recipes:any")


def test_settings_that_only_fit_together_can_be_changed_together() -> None:
    both = ["data.micro_batch=3", "data.window_images=6"]
    assert load(TINY, both).data == load(TINY, both[::-1]).data
    with pytest.raises(ConfigError, match=r"data\.window_images=4: must be a multiple of data\.micro_batch=3"):
        load(TINY, both[:1])


def test_a_family_of_the_users_own_is_identified_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = (
        "from dataclasses import dataclass, replace\nfrom rayscale.recipes import Recipe\n"
        "from rayscale.recipes.compact import tiny\nfrom rayscale.tasks.compact import Compact\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Own(Compact):\n    pass\n"
        "def own() -> Recipe:\n    return replace(tiny(), task=Own())\n"
    )
    digests = []
    for number, text in enumerate((source, source + "# edited\n")):
        (tmp_path / f"own_recipes_{number}.py").write_text(text)
        digests.append(resolved(load(f"own_recipes_{number}:own"))["task_source"])
    assert digests[0] != digests[1]
    assert "task_source" not in resolved(load(TINY))


def test_overrides_can_be_replaced_in_code_too() -> None:
    base = load(TINY)
    assert load(TINY, ["run.total_images=512"]) == replace(base, run=replace(base.run, total_images=512))
