"""infra/kuberay, without a cluster: rendered, of the right types, closed where it must be, and the size it says."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).resolve().parents[2]
commands = runpy.run_path(str(ROOT / "tests/commands.py"))
KUBERAY = ROOT / "infra/kuberay"
OVERLAYS = ("staging", "production")
KUBERNETES = "v1.33.0-local-strict"  # the oldest that we say
Manifest = dict[str, Any]
SECRET = re.compile(r"SECRET|PASSWORD|TOKEN|KEYS?$|AUTH$")


def documents(*files: Path) -> list[Manifest]:
    return [found for file in files for found in yaml.safe_load_all(file.read_text()) if found]


@functools.cache
def rendered(overlay: str) -> str:
    for program in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(program[0]):
            done = subprocess.run([*program, str(KUBERAY / "overlays" / overlay)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout
    pytest.skip("neither kustomize nor kubectl is installed: the overlays are not rendered")


def manifests(source: str) -> list[Manifest]:
    """Of "train", or of an overlay as kustomize makes it."""
    if source == "train":
        return documents(KUBERAY / "train.yaml")
    return list(yaml.safe_load_all(rendered(source)))


def base() -> list[Manifest]:
    names = yaml.safe_load((KUBERAY / "base/kustomization.yaml").read_text())["resources"]
    return documents(*(KUBERAY / "base" / name for name in names))


def of_kind(found: list[Manifest], kind: str) -> list[Manifest]:
    return [m for m in found if m["kind"] == kind]


def pods(found: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template: `kind/name/group`, template."""
    for m in found:
        name = f"{m['kind']}/{m['metadata'].get('name', 'train')}"
        if m["kind"] in ("Deployment", "StatefulSet"):
            yield name, m["spec"]["template"]
        elif m["kind"] in ("RayService", "RayJob"):
            spec = m["spec"].get("rayClusterConfig") or m["spec"]["rayClusterSpec"]
            yield f"{name}/head", spec["headGroupSpec"]["template"]
            for group in spec["workerGroupSpecs"]:
                yield f"{name}/{group['groupName']}", group["template"]


# Types


@functools.cache
def types() -> tuple[Path, Registry[Any]]:
    """Kubernetes' types as JSON Schema, strict: an unknown field is refused."""
    spec = importlib.util.find_spec("kubernetes_validate")  # a folder of schemas; its code is not needed
    if spec is None or spec.origin is None:
        pytest.skip("kubernetes-validate is not installed: types are not checked")
    folder = Path(spec.origin).parent / "kubernetes-json-schema" / KUBERNETES
    shared = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return folder, Registry().with_resources([(shared.id() or "", shared), ("kubernetes", shared)])


def check_type(manifest: Manifest) -> None:
    """Raises: jsonschema.ValidationError."""
    folder, registry = types()
    group, _, version = manifest["apiVersion"].rpartition("/")
    if group == "ray.io":
        schema = yaml.safe_load((ROOT / "tests/golden/kuberay.yaml").read_text())
    else:
        name = "-".join(filter(None, (manifest["kind"].lower(), group.partition(".")[0], version)))
        schema = json.loads((folder / f"{name}.json").read_text())
    jsonschema.Draft202012Validator(schema, registry=registry).validate(manifest)


@pytest.mark.parametrize("source", ["train", *OVERLAYS])
def test_every_manifest_is_of_its_type(source: str) -> None:
    for manifest in manifests(source):
        check_type(manifest)


def _break(manifest: Manifest, path: str, value: Any) -> Manifest:
    broken = copy.deepcopy(manifest)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    functools.reduce(lambda at, key: at[key], parents, broken)[last] = value
    return broken


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/rayClusterConfig/authOptions/mode", "tokn"),
        ("spec/rayClusterConfig/autoscalerOption", {}),
        ("spec/rayClusterConfig/workerGroupSpecs/0/maxReplicas", "4"),
        ("spec/rayClusterConfig/headGroupSpec/template/spec/containers/0/readinesProbe", {}),
        ("spec/rayClusterConfig/gcsFaultToleranceOptions/redisPassword", {"value": "open"}),
    ],
)
def test_a_wrong_field_is_refused(path: str, value: Any) -> None:
    """Negative control."""
    (service,) = of_kind(base(), "RayService")
    check_type(service)
    with pytest.raises(jsonschema.ValidationError):
        check_type(_break(service, path, value))


# Kustomize


def patch_faults(overlay: str, kustomization: Manifest, read: Callable[[str], list[Manifest]]) -> list[str]:
    """Patches and replacements that would meet nothing. Asks no kustomize."""
    faults = []
    there = {(m["kind"], m["metadata"]["name"]): m for m in base()}
    for patch in kustomization.get("patches", ()):
        target = patch["target"]
        manifest = there.get((target["kind"], target["name"]))
        if manifest is None:
            faults.append(f"{overlay}: {patch['path']} meets no {target['kind']} {target['name']}")
            continue
        for operation in read(patch["path"]):
            *parents, last = [int(p) if p.isdigit() else p for p in operation["path"].strip("/").split("/")]
            try:
                parent = functools.reduce(lambda at, key: at[key], parents, manifest)
                if operation["op"] != "add":
                    parent[last]
            except (KeyError, IndexError, TypeError):
                faults.append(f"{overlay}: {operation['op']} {operation['path']} meets nothing")
    files = yaml.safe_load((ROOT / "serve_configs/Kustomization").read_text())["configMapGenerator"][0]["files"]
    for replacement in kustomization.get("replacements", ()):
        file = replacement["source"]["fieldPath"].removeprefix("data.[").removesuffix("]")
        if file not in files or not (ROOT / "serve_configs" / file).exists():
            faults.append(f"{overlay}: there is no serve_configs/{file}")
        for target in replacement["targets"]:
            if (target["select"]["kind"], target["select"]["name"]) not in there:
                faults.append(f"{overlay}: a replacement meets no {target['select']}")
    return faults


def _overlay(name: str) -> tuple[Manifest, Callable[[str], list[Manifest]]]:
    folder = KUBERAY / "overlays" / name
    return yaml.safe_load((folder / "kustomization.yaml").read_text()), lambda f: yaml.safe_load(
        (folder / f).read_text()
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_patch_meets_what_it_changes(name: str) -> None:
    assert patch_faults(name, *_overlay(name)) == []


def test_a_patch_that_meets_nothing_is_found() -> None:
    """Negative control."""
    kustomization, _ = _overlay("production")
    wrong = [{"op": "replace", "path": "/spec/rayClusterConfig/workerGroupSpecs/1/maxReplicas", "value": 8}]
    assert "meets nothing" in patch_faults("production", kustomization, lambda _: wrong)[0]
    kustomization["patches"][0]["target"]["name"] = "rayscales"
    assert "meets no RayService" in patch_faults("production", *(kustomization, _))[0]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_service_serves_what_serve_configs_say(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    from rayscale.serve.app import AppArgs

    (service,) = of_kind(manifests(name), "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config == yaml.safe_load((ROOT / f"serve_configs/{name}.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    AppArgs.model_validate(application.args)


# Pods


def pod_faults(where: str, template: Manifest) -> list[str]:
    faults = []
    spec = template["spec"]
    user = spec.get("securityContext", {}).get("runAsUser", 0)
    for container in spec["containers"]:
        at, security = f"{where}/{container['name']}", container.get("securityContext", {})
        resources = container.get("resources", {})
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        checks = {
            "its image is not pinned": tag and tag != "latest",
            "it runs as root": user > 0,
            "it may gain rights": security.get("allowPrivilegeEscalation") is False,
            "it keeps capabilities": security.get("capabilities", {}).get("drop") == ["ALL"],
            "it asks for no CPU and memory": {"cpu", "memory"} <= set(resources.get("requests", {})),
            "its memory has no limit": "memory" in resources.get("limits", {}),
            "nobody asks whether it lives": "livenessProbe" in container,
        }
        faults += [f"{at}: {fault}" for fault, good in checks.items() if not good]
        for env in container.get("env", ()):
            if SECRET.search(env["name"]) and "valueFrom" not in env:
                faults.append(f"{at}: {env['name']} is written out")
    return faults


@pytest.mark.parametrize("source", ["train", *OVERLAYS])
def test_pods_are_pinned_limited_watched_and_without_rights(source: str) -> None:
    found = manifests(source)
    assert [fault for where, pod in pods(found) for fault in pod_faults(where, pod)] == []
    assert of_kind(found, "Secret") == []  # by reference only


def test_a_careless_pod_is_found() -> None:
    """Negative control."""
    careless = {"spec": {"containers": [
        {"name": "x", "image": "host:5000/x", "env": [{"name": "DB_PASSWORD", "value": "open"}]}]}}  # fmt: skip
    assert len(pod_faults("x", careless)) == 8


def test_training_goes_on_where_it_was() -> None:
    """The RayJob's command is one of ours, resumes from S3, and asks for the nodes that are there."""
    (job,) = manifests("train")
    program, *words = shlex.split(job["spec"]["entrypoint"])
    assert program == "rayscale"
    options = commands["parsed"](words)
    assert options["storage"].startswith("s3://")
    assert 1 <= options["min_workers"] < options["workers"]
    assert job["spec"]["backoffLimit"] >= 1
    groups = {g["groupName"]: g for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    assert groups["gpus"]["maxReplicas"] == options["workers"]
    assert [f"{k}={v}" for k, v in groups["data"]["labels"].items()] == options["data_nodes"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_nodes_hold_what_is_to_be_served(name: str) -> None:
    """At the least and at the most: CPUs and GPUs of the deployments against those of the nodes."""
    (service,) = of_kind(manifests(name), "RayService")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    asked = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    for which, replicas in (("min", group["minReplicas"]), ("max", group["maxReplicas"])):
        for resource, option in (("cpu", "num_cpus"), ("nvidia.com/gpu", "num_gpus")):
            need = sum(
                d.get("ray_actor_options", {}).get(option, 0)
                * d.get("autoscaling_config", {}).get(f"{which}_replicas", d.get("num_replicas", 1))
                for d in application["deployments"]
            )
            assert need <= replicas * int(asked.get(resource, 0)), (which, resource)


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_drain_leaves_some_and_ends(name: str) -> None:
    found = manifests(name)
    (service,) = of_kind(found, "RayService")
    least = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"]
    budgets = {m["metadata"]["name"]: m["spec"]["minAvailable"] for m in of_kind(found, "PodDisruptionBudget")}
    assert 1 <= budgets["serve-workers"] < least  # one can always go


# Network

RAY_PORTS = (6379, 8076, 8265, 10001, 10002, 52365, 8404, 9101, 30000, 31000, 40000, 41000)  # of GCS ... gRPC ingress


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] in ("In", "Exists")
        if expression["key"] not in labels or labels[expression["key"]] not in expression.get(
            "values", [*labels.values()]
        ):
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def reaches(policies: list[Manifest], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """May a pod reach another's port? `namespace` among the source's labels: it is in that other namespace."""
    chosen = [p["spec"] for p in policies if _selects(p["spec"]["podSelector"], target)]
    other = source.get("namespace")
    for rule in (rule for spec in chosen for rule in spec.get("ingress", ())):
        if "ports" in rule and port not in [p["port"] for p in rule["ports"]]:
            continue
        for peer in rule["from"]:
            if "namespaceSelector" in peer:
                if other and _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other}):
                    return True
            elif not other and _selects(peer["podSelector"], source):
                return True
    return not chosen


def _pod(component: str, node: str = "") -> dict[str, str]:
    return {"app.kubernetes.io/component": component} | ({"ray.io/node-type": node} if node else {})


def test_prometheus_finds_every_pod_of_ray_and_users_find_serve() -> None:
    (monitor,) = of_kind(
        list(yaml.safe_load_all((ROOT / "infra/observability/podmonitor.yaml").read_text())), "PodMonitor"
    )
    cluster = of_kind(base(), "RayService")[0]["spec"]["rayClusterConfig"]
    head, workers = cluster["headGroupSpec"]["template"], [g["template"] for g in cluster["workerGroupSpecs"]]
    for node, template in [("head", head), *(("worker", t) for t in workers)]:
        assert _selects(monitor["spec"]["selector"], template["metadata"]["labels"] | {"ray.io/node-type": node})
    assert not _selects(monitor["spec"]["selector"], head["metadata"]["labels"])  # negative control
    # Where the head names ports, KubeRay makes the Service of the endpoint from the one called serve.
    assert {"name": "serve", "containerPort": 8000} in head["spec"]["containers"][0]["ports"]


@pytest.fixture(scope="module")
def policies() -> list[Manifest]:
    return of_kind(base(), "NetworkPolicy")


def test_the_ports_inside_are_closed_to_all_others(policies: list[Manifest]) -> None:
    strangers = [{"namespace": name} for name in ("default", "ingress-nginx", "monitoring", "kuberay-system")]
    strangers += [_pod("mlflow"), _pod("other"), {}]
    for component in ("serve", "train"):
        other = {"serve": "train", "train": "serve"}[component]
        for node in ("head", "worker"):
            for port in RAY_PORTS:
                allowed = [
                    s for s in [*strangers, _pod(other, "worker")] if reaches(policies, s, _pod(component, node), port)
                ]
                operator = {"namespace": "kuberay-system"}
                assert allowed == ([operator] if (node, port) == ("head", 8265) else []), (component, node, port)
                assert reaches(policies, _pod(component, "worker"), _pod(component, node), port)


def test_what_must_be_reached_is(policies: list[Manifest]) -> None:
    worker = _pod("serve", "worker")
    assert reaches(policies, {"namespace": "ingress-nginx"}, worker, 8000)
    assert not reaches(policies, {"namespace": "default"}, worker, 8000)
    assert reaches(policies, {"namespace": "monitoring"}, worker, 8080)
    for component in ("serve", "train"):
        assert reaches(policies, _pod(component, "worker"), _pod("mlflow"), 5000)
    assert not reaches(policies, {"namespace": "ingress-nginx"}, _pod("mlflow"), 5000)
    assert reaches(policies, _pod("mlflow"), _pod("postgres"), 5432)
    assert not reaches(policies, worker, _pod("postgres"), 5432)
    assert reaches(policies, _pod("serve", "head"), _pod("redis"), 6379)
    assert not reaches(policies, worker, _pod("redis"), 6379)


def test_without_a_policy_all_is_open(policies: list[Manifest]) -> None:
    """Negative control: it is the policies that close."""
    assert reaches([], {"namespace": "default"}, _pod("serve", "head"), 6379)
    left = [p for p in policies if p["metadata"]["name"] != "closed"]
    assert reaches(left, {"namespace": "default"}, _pod("new"), 80)
