"""The repository itself: formatted, linted, typed, layered; each heavy library in its homes; a clean wheel."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform/rayscale"

HOMES = {  # library -> the only files that may import it
    "boto3": {"storage_s3.py", "s3_client.py"},
    "botocore": {"storage_s3.py", "s3_client.py"},
    "mlflow": {"tracking.py", "registry/models.py"},
    "onnxruntime": {"artifact.py"},
    "httpx": {"client/*"},
    "ray.data": {"data/pairs.py", "bulk/pool.py"},
    "ray.train": {"train/runner.py", "train/hooks.py", "data/pairs.py"},
    "ray.serve": {"serve/app.py"},
    "torch": {
        "task.py",
        "nn.py",
        "losses.py",
        "augment_torch.py",
        "upscaler.py",
        "perceptual.py",
        "export.py",
        "evaluate/model.py",
        "cli/train.py",
        "tasks/*",
        "train/*",
    },
}


def run(*command: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_formatted() -> None:
    run("ruff", "format", "--check", ".")


def test_linted() -> None:
    run("ruff", "check", ".")


def test_typed() -> None:
    run("mypy", "-p", "rayscale")


def test_layers_hold() -> None:
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "3 kept, 0 broken" in done.stdout


def imports(source: str) -> Iterator[str]:
    """Every module that the source imports, `ray.data` for both `import ray.data` and `from ray import data`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def strays(files: dict[str, str]) -> list[str]:
    """`file imports library` for every import outside its homes."""
    found = set()
    for file, source in files.items():
        for module in imports(source):
            for library, homes in HOMES.items():
                at_home = file in homes or f"{file.partition('/')[0]}/*" in homes
                if (module == library or module.startswith(f"{library}.")) and not at_home:
                    found.add(f"{file} imports {library}")
    return sorted(found)


def test_each_heavy_library_stays_in_its_homes() -> None:
    assert strays({str(f.relative_to(PACKAGE)): f.read_text() for f in PACKAGE.rglob("*.py")}) == []


def test_a_stray_import_is_found() -> None:
    """Negative control."""
    planted = {
        "serve/engine.py": "from ray import train\nimport onnxruntime as ort\ndef f():\n    import mlflow.onnx\n"
    }
    assert strays(planted) == [f"serve/engine.py imports {lib}" for lib in ("mlflow", "onnxruntime", "ray.train")]


def test_pythons_own_platform_module_is_not_shadowed() -> None:
    assert not (ROOT / "platform/__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() in ("Linux", "Darwin", "Windows")


def test_the_wheel_contains_only_the_package(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    wheel = next(iter(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"rayscale", next(t for t in tops if t.endswith(".dist-info"))}
    assert {"rayscale/data/plan.py", "rayscale/serve/playground/app.js"} <= set(names)


def tracked_files(folder: str) -> list[str]:
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    found = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True).stdout.split()
    return found or pytest.skip("not a git checkout")


@pytest.mark.parametrize("file", [".", "jobs", "infra", "tests", "serve_configs"])
def test_no_folder_is_a_placeholder(file: str) -> None:
    folder = ROOT / file
    tracked = tracked_files(file)
    assert all((ROOT / t).stat().st_size > 0 for t in tracked if folder in (ROOT / t).parents)


def test_the_job_runtime_environment_ships_the_checkout() -> None:
    env = yaml.safe_load((ROOT / "jobs/runtime_env.yaml").read_text())
    assert [(ROOT / m / "__init__.py").exists() for m in env["py_modules"]] == [True]
    assert {".git", ".venv", "demo-out"} <= set(env["excludes"])


def test_no_path_of_this_machine_is_committed() -> None:
    files = tracked_files(".")
    for file in files:
        if (ROOT / file).suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json", ""}:
            text = (ROOT / file).read_text(errors="replace")
            for wrong in (str(ROOT), sys.prefix, str(Path.home()) + os.sep):
                assert wrong not in text, f"{file} holds {wrong}"
