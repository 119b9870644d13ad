"""Commands, code and trees of the README and of the operator's guide are true."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "infra/README.md").read_text()
parsed = runpy.run_path(str(ROOT / "tests/commands.py"))["parsed"]


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced blocks of that language, also those inside lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE).replace("\\\n", " ") for indent, text in found]


def lines(start: str, page: str = README + GUIDE) -> list[list[str]]:
    """The words of every command that begins so."""
    found = [line for block in blocks("sh", page) for line in block.splitlines()]
    return [shlex.split(line) for line in found if line.startswith(start)]


def test_the_page_takes_a_reader_through_all_jobs() -> None:
    jobs = [Path(words[1]) for words in lines("submit jobs/", README)]
    assert [job.stem for job in jobs] == ["ingest", "train", "publish", "promote", "evaluate", "upscale"]
    assert all((ROOT / job).exists() for job in jobs)


@pytest.mark.parametrize("line", sorted({shlex.join(w[1:]) for w in lines("submit jobs/") + lines("rayscale ")}))
def test_every_command_parses(line: str) -> None:
    """The command is there, and has these flags."""
    first, *rest = shlex.split(line)
    words = [Path(first).stem, *rest]
    parsed(words)
    with pytest.raises(ValueError, match="--no-such-flag"):  # negative control
        parsed([*words, "--no-such-flag"])


def test_the_guide_names_files_that_are_there() -> None:
    """In its commands, and in its tree."""
    named = re.findall(r"(?:-k|-f|--file) +([\w./-]*infra/[\w./-]+)", "\n".join(blocks("sh", GUIDE)))
    assert len(named) >= 8
    for file in named:
        if file != "infra/compose/.env":
            assert (ROOT / file).exists(), file
    stack = (ROOT / "infra/local/stack/__main__.py").read_text()
    assert all(f'("{words[2]}"' in stack for words in lines("python infra/local/stack", GUIDE))
    tree = blocks("", GUIDE)[0]
    assert {line.split("/ ")[0] for line in tree.splitlines() if line.startswith("infra/")} == {
        f"infra/{folder.name}" for folder in (ROOT / "infra").iterdir() if folder.is_dir()
    }
    for test in re.findall(r"`(?:tests/unit/)?(test_\w+\.py)`", GUIDE):
        assert (ROOT / "tests/unit" / test).exists(), test


def test_the_guide_asks_for_the_secrets_that_the_manifests_name() -> None:
    manifests = "".join(file.read_text() for file in (ROOT / "infra/kuberay").rglob("*.yaml"))
    named = set(re.findall(r"(?:secretKeyRef|secretRef): \{name: ([\w-]+)|secretName: ([\w-]+)", manifests))
    made = {words[words.index("generic") + 1] for words in lines("kubectl", GUIDE) if "generic" in words}
    assert made == {name for pair in named for name in pair if name}


def test_the_guide_shows_panels_that_are_there() -> None:
    boards = "".join(file.read_text() for file in (ROOT / "infra/observability/grafana").glob("*.json"))
    titles = set(re.findall(r"`([A-Z][a-z]+(?: [a-z]+)+)`", " ".join(GUIDE.split())))
    assert len(titles) >= 5
    assert [title for title in titles if f'"title": "{title}"' not in boards] == []


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
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", README + GUIDE, re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_the_serve_config_named_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    from rayscale.serve.app import AppArgs

    config = yaml.safe_load((ROOT / "serve_configs/local.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    AppArgs.model_validate(application.args)
