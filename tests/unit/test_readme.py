"""The README's commands, code and tree are true."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from rayscale.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of that language, also those inside lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE).replace("\\\n", " ") for indent, text in found]


def jobs() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("submit jobs/")]


def test_the_page_takes_a_reader_through_all_jobs() -> None:
    assert [Path(job[0]).stem for job in jobs()] == ["ingest", "train", "publish", "promote", "evaluate", "upscale"]


def parse(name: str, arguments: list[str]) -> None:
    """The flags are those of the command."""
    module, _, function = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(module), function)
    app = typer.Typer()
    seen: dict[str, Any] = {}

    @app.command()
    @functools.wraps(command)
    def parsed(**kwargs: Any) -> None:
        seen.update(kwargs)

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert seen
    assert CliRunner().invoke(app, [*arguments, "--no-such-flag"]).exit_code == 2  # negative control


@pytest.mark.parametrize("job", jobs(), ids=lambda job: job[0])
def test_every_job_command_parses(job: list[str]) -> None:
    """The script is there, and its flags are those of the command behind it."""
    assert (ROOT / job[0]).exists()
    parse(Path(job[0]).stem, job[1:])


def test_every_command_about_models_parses() -> None:
    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    given = [words[1:] for words in lines if words[:2] == ["rayscale", "models"]]
    assert len(given) > 5
    for words in given:
        if words[1] != "list":  # takes nothing
            parse(" ".join(words[:2]), words[2:])


def test_the_python_block_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayscale import recipes

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "readme_recipes.py").write_text(next(block for block in blocks("python") if "def mine" in block))
    recipe = recipes.load("readme_recipes:mine")
    assert recipe.task.features == 128  # type: ignore[attr-defined]


def test_the_gate_named_is_valid(tmp_path: Path) -> None:
    from rayscale.cli.judge import gate_of
    from rayscale.registry.models import Version

    (text,) = blocks("yaml")
    (tmp_path / "gate.yaml").write_text(text)
    version = Version(name="m", version=1, digest="", uri="", run_id="")
    gate, _ = gate_of(version, str(tmp_path / "gate.yaml"))
    assert gate.suites == ("published", "night")


def test_the_trees_paths_are_there() -> None:
    tree = README[README.index("platform/rayscale/ ") :].partition("```")[0]
    package = ROOT / "platform/rayscale"
    for line in tree.splitlines():
        if line.startswith("   "):  # a description that goes on
            continue
        inside = line.startswith("  ")
        for word in re.split(r"\s{2,}", line.strip())[0].split():
            assert ((package if inside else ROOT) / word).exists(), word


def test_every_module_of_the_package_stands_in_the_tree() -> None:
    tree = README[README.index("platform/rayscale/ ") : README.index("jobs/  ")]
    for path in (ROOT / "platform/rayscale").iterdir():
        if not path.name.startswith("__"):
            assert path.name in tree, path.name


def test_the_commands_of_the_makefile_are_the_readmes() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert f"\n{target}:" in makefile, target


def test_the_serve_config_named_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    from rayscale.serve.app import AppArgs

    config = yaml.safe_load((ROOT / "serve_configs/local.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    AppArgs.model_validate(application.args)
