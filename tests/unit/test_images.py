"""infra/docker and infra/compose, without Docker: pinned, without rights or secrets, and all that serving needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "infra/docker").glob("*.Dockerfile"))
COMPOSE = ROOT / "infra/compose/compose.yaml"
SECRET = re.compile(r"SECRET|PASSWORD|TOKEN|KEYS?$|AUTH$|_URI$")


@pytest.mark.parametrize("file", sorted((ROOT / "infra").rglob("*.yaml")), ids=lambda f: str(f.relative_to(ROOT)))
def test_every_yaml_parses(file: Path) -> None:
    assert list(yaml.safe_load_all(file.read_text()))


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, its argument), continued lines joined and comments left out."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = [line.strip() for line in kept.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def image_faults(text: str) -> list[str]:
    """What is careless about a Dockerfile."""
    steps = instructions(text)
    last = dict(steps)
    bases = [rest.split()[0] for word, rest in steps if word == "FROM"]
    user = last.get("USER", "root").partition(":")[0]
    runs = [rest for word, rest in steps if word == "RUN"]
    pips = [run for run in runs if "pip install" in run]
    checks = {
        "its base is not pinned": all(re.search(r":[\w.-]*\d+\.\d+\.\d+|@sha256:", base) for base in bases),
        "it runs as root": user not in ("root", "0"),
        "it has no health check": "HEALTHCHECK" in last,
        "it fetches from an address": not any(word == "ADD" for word, _ in steps)
        and not any(re.search(r"\b(curl|wget)\b.*https?://", run) for run in runs),
        "its start is no list": all(last.get(word, "[").startswith("[") for word in ("ENTRYPOINT", "CMD")),
        "nobody reaps its children": "tini" in last.get("ENTRYPOINT", ""),
        "versions are not those of constraints.txt": all("--constraint constraints.txt" in pip for pip in pips),
        "it keeps pip's cache": all("--no-cache-dir" in pip for pip in pips),
        "it keeps apt's lists": all("rm -rf /var/lib/apt/lists/*" in run for run in runs if "apt-get" in run),
        "it writes a secret": not any(word in ("ENV", "ARG") and re.search(r"(SECRET|PASSWORD|TOKEN)=", rest)
                                      for word, rest in steps),
    }  # fmt: skip
    return [fault for fault, good in checks.items() if not good]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.stem)
def test_images_are_careful(file: Path) -> None:
    text = file.read_text()
    assert image_faults(text) == []
    minor = re.search(r"python:(3\.\d+)", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert minor
    assert minor[1] in project["requires-python"]
    for word, rest in instructions(text):
        if word == "COPY":  # out of what .dockerignore lets through
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(line.startswith(f"!{source}") or Path(source).match(line[1:]) for line in ignored()), source


def ignored() -> list[str]:
    return [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


@pytest.mark.parametrize(
    ("change", "to", "fault"),
    [
        (r"python:3[\w.-]*", "python:latest", "base is not pinned"),
        (r"python:3[\w.-]*", "python:3.11", "base is not pinned"),
        ("USER 1000", "USER root", "runs as root"),
        ("USER 1000", "", "runs as root"),
        (r"HEALTHCHECK[^\n]*\n", "LABEL x=y \\\n", "no health check"),
        ("COPY constraints", "ADD https://example.com/x y\nCOPY constraints", "fetches"),
        (r'CMD \["ray".*', "CMD ray start --head", "no list"),
        (r"ENTRYPOINT.*", "", "reaps"),
        ("--constraint constraints.txt", "", "constraints.txt"),
        ("ENV ", "ENV RAY_AUTH_TOKEN=x ", "writes a secret"),
    ],
)
def test_a_careless_image_is_found(change: str, to: str, fault: str) -> None:
    """Negative control."""
    for file in DOCKERFILES:
        careless, num = re.subn(change, to.replace("\\", "\\\\"), file.read_text(), count=1)
        assert num == 1
        assert [f for f in image_faults(careless) if fault in f], careless


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, *map(str, DOCKERFILES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    wrong = subprocess.run([program, "-"], input="FROM python\nRUN cd /x\n", capture_output=True, text=True)
    assert wrong.returncode != 0  # negative control


def names(lines: list[str]) -> set[str]:
    found = (re.match(r"[\w.-]+(\[[\w,]+\])?", line) for line in lines)
    return {m[0].lower().replace("_", "-") for m in found if m}


def test_serving_needs_what_its_image_has() -> None:
    """Its list is pyproject.toml's without training; nothing of it is without a version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    serve = names((ROOT / "infra/docker/serve.txt").read_text().splitlines())
    left_out = {"torch", "safetensors", "mlflow", "onnxscript", "onnx-ir", "typer", "httpx", "nvidia-ml-py", "pyyaml"}
    ours = {name.partition("[")[0] for name in names(project["dependencies"])} - {"onnxruntime"}
    assert {name.partition("[")[0] for name in serve} - {"mlflow-skinny"} == ours - left_out
    pinned = names((ROOT / "constraints.txt").read_text().splitlines())
    assert {name.partition("[")[0] for name in serve} <= pinned


@pytest.mark.long
def test_serving_imports_nothing_that_its_image_has_not() -> None:
    """Asked of a process in which everything that the image leaves out cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'safetensors', 'onnxscript', 'onnx_ir', 'typer', 'httpx', 'pynvml', 'sqlalchemy'):\n"
        "    sys.modules[name] = None\n"
        "import rayscale.serve.app, rayscale.serve.api, rayscale.serve.vectors, rayscale.registry.models\n"
        "import rayscale.s3_client, rayscale.storage_s3\n"
    )
    env = {"PYTHONPATH": str(ROOT / "platform"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


# Compose


def compose_faults(compose: dict[str, Any]) -> list[str]:
    found = []
    for name, service in compose["services"].items():
        tag = service["image"].rpartition("/")[2].partition(":")[2]
        if not re.match(r"v?\d+\.\d+", tag):
            found.append(f"{name}: its image is not pinned")
        found += [f"{name}: {port} is open to the network" for port in service.get("ports", ())
                  if not port.startswith("127.0.0.1:")]  # fmt: skip
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key) and "://mlflow:5000" not in value and not re.search(r"\$\{\w+", value):
                found.append(f"{name}: {key} is written out")
        found += [f"{name}: waits for {other}, which is not" for other in service.get("depends_on", ())
                  if other not in compose["services"]]  # fmt: skip
        for other, on in service.get("depends_on", {}).items():
            named = compose["services"].get(other, {})
            watched = "healthcheck" in named or "build" in named  # our images have a check of their own
            if on["condition"] == "service_healthy" and not watched:
                found.append(f"{name}: waits for the health of {other}, which nobody asks")
    return found


def test_compose_is_careful_and_whole() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    assert compose_faults(compose) == []
    for service in compose["services"].values():
        if "build" in service:
            assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert (COMPOSE.parent / source).exists() if source.startswith(".") else source in compose["volumes"], (
                source
            )
        assert {c["source"] for c in service.get("configs", ())} <= compose["configs"].keys()
    assert (COMPOSE.parent / compose["configs"]["serve"]["file"]).exists()
    guide = (ROOT / "infra/README.md").read_text()
    for variable in set(re.findall(r"\$\{(\w+)", COMPOSE.read_text())):
        assert variable in guide, f"the guide does not say what {variable} is"


def test_careless_compose_is_found() -> None:
    """Negative control."""
    careless = {"services": {"x": {"image": "x:latest", "ports": ["8000:8000"], "depends_on": {
        "y": {"condition": "service_started"}}, "environment": {"DB_PASSWORD": "open"}}}}  # fmt: skip
    assert len(compose_faults(careless)) == 4


def test_compose_and_kubernetes_run_the_same_versions() -> None:
    text = COMPOSE.read_text() + "".join(f.read_text() for f in (ROOT / "infra/kuberay").rglob("*.yaml"))
    versions: dict[str, set[str]] = {}
    for name, tag in re.findall(r"image: (?:[\w./-]*/)?([\w-]+):([\w.-]+)", text):
        versions.setdefault(name, set()).add(tag)
    assert {name: tags for name, tags in versions.items() if len(tags) > 1} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert versions["rayscale-serve"] == versions["rayscale-train"] == {project["version"]}
    (ray,) = (d.partition("==")[2] for d in project["dependencies"] if d.startswith("ray["))
    assert set(re.findall(r'rayVersion: "([\d.]+)"', text)) == {ray}
