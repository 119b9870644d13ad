"""Rules and dashboards against the metrics that there are, and what the rules say of a bad hour."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from rayscale.observe import METRICS

ROOT = Path(__file__).resolve().parents[2]
OBSERVABILITY = ROOT / "infra/observability"
DASHBOARDS = sorted((OBSERVABILITY / "grafana").glob("*.json"))
RULES = [
    rule for group in yaml.safe_load((OBSERVABILITY / "rules.yaml").read_text())["groups"] for rule in group["rules"]
]
OF_HISTOGRAMS = ("_bucket", "_sum", "_count")
WORDS = {"and", "or", "unless", "on", "ignoring", "bool", "by", "without", "offset", "group_left", "group_right"}


@functools.cache
def ours() -> dict[str, tuple[str, ...]]:
    """Names in Prometheus of our metrics -> their labels."""
    found = {}
    for m in METRICS.values():
        for suffix in OF_HISTOGRAMS if m.kind == "histogram" else ("",):
            found[f"ray_{m.name}{suffix}"] = m.labels
    return found


@functools.cache
def rays() -> set[str]:
    """Those that this Ray's own dashboards show, and those of Serve's deployments."""
    folder = Path(ray.__file__).parent
    panels = (folder / "dashboard/modules/metrics/dashboards").glob("*_panels.py")
    shown = {name for file in panels for name in re.findall(r"\bray_\w+", file.read_text())}
    deployments = (folder / "serve/_private/deployment_state.py").read_text()
    return shown | {f"ray_{name}" for name in re.findall(r'Gauge\(\s*"(serve_\w+)"', deployments)}


def expressions() -> Iterator[tuple[str, str]]:
    """Where, and what is asked; Grafana's variables as their values would be."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{file.stem}: {panel['title']}", re.sub(r"\$\w+", ".*", target["expr"])


def faults(expression: str) -> list[str]:
    """What is wrong with PromQL, as far as names, labels and brackets tell."""
    known = ours()
    bare = re.sub(r'"[^"]*"', '""', expression)
    found = []
    open_ones: list[str] = []
    for char in bare:
        if char in "([{":
            open_ones.append(char)
        elif char in ")]}" and (not open_ones or "([{".index(open_ones.pop()) != ")]}".index(char)):
            found.append("brackets do not match")
            break
    if open_ones:
        found.append("a bracket is left open")
    grouped = {
        w for group in re.findall(r"\b(?:by|without|on|ignoring) *\(([^)]*)\)", bare) for w in re.findall(r"\w+", group)
    }
    matched = {name: re.findall(r"(\w+) *(?:=|!)", inside) for name, inside in re.findall(r"(\w+)\{([^}]*)\}", bare)}
    outside = re.sub(r"\b(?:by|without|on|ignoring) *\([^)]*\)|\{[^}]*\}|\[[^\]]*\]", " ", bare)
    names = {w for w in re.findall(r"(?<![\w.])[a-z_]\w*\b(?! *\()", outside) if w not in WORDS}
    metrics = rays() | known.keys() | {"up"}
    found += [f"there is no metric {name}" for name in sorted(names - metrics)]
    for name, labels in matched.items():
        found += [f"{name} has no label {x}" for x in labels if name in known and x not in (*known[name], "instance")]
    if names and names <= known.keys():
        labels = {label for name in names for label in known[name]} | {"le", "instance"}
        found += [f"none of its metrics has a label {label}" for label in sorted(grouped - labels)]
    return found


def test_what_is_asked_for_is_there() -> None:
    assert {where: found for where, expression in expressions() if (found := faults(expression))} == {}


def test_every_metric_of_ours_is_shown() -> None:
    asked = " ".join(expression for _, expression in expressions())
    shown = {m.name for m in METRICS.values() if re.search(rf"\bray_{m.name}\b|\bray_{m.name}_", asked)}
    assert shown == set(METRICS)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ("sum(rate(ray_rayscale_request_total[5m]))", "no metric ray_rayscale_request_total"),
        ("rate(rayscale_tiles_total[5m])", "no metric rayscale_tiles_total"),
        ("rate(ray_rayscale_request_seconds[5m])", "no metric ray_rayscale_request_seconds"),
        ('ray_rayscale_tiles_total{modle="x"}', "has no label modle"),
        ("sum by (status) (ray_rayscale_tiles_total)", "has a label status"),
        ("ray_serve_deployment_replica_helthy < 1", "no metric"),
        ("sum(rate(ray_rayscale_tiles_total[5m])", "left open"),
        ("sum(rate(ray_rayscale_tiles_total[5m)])", "do not match"),
    ],
)
def test_a_wrong_question_is_found(wrong: str, fault: str) -> None:
    """Negative control."""
    assert re.search(fault, " ".join(faults(wrong)))


def test_expressions_are_promql() -> None:
    promql = pytest.importorskip("promql_parser", reason="promql-parser is not installed: PromQL is not parsed")
    for _, expression in expressions():
        promql.parse(expression)
    with pytest.raises(ValueError):
        promql.parse("sum by (le) (x{a=~})")  # negative control


def test_every_alert_says_what_to_do() -> None:
    """Its runbook is a heading of the operator's guide with text under it; the guide explains no alert that is not."""
    guide = (ROOT / "infra/README.md").read_text()
    headings = dict(re.findall(r"^#+ (\w+)\n\n(.+)", guide, re.MULTILINE))
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"infra/README.md#{rule['alert'].lower()}"
        assert len(headings.get(rule["alert"], "")) > 40, f"{rule['alert']} has no runbook"
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]
    written = {h for h in headings if h.startswith(("Rayscale", "Ray")) and h[3:4].isalpha()}
    assert written == {rule["alert"] for rule in RULES}


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda f: f.stem)
def test_dashboards_are_whole(file: Path) -> None:
    board = json.loads(file.read_text())
    (source,) = yaml.safe_load((OBSERVABILITY / "grafana/datasource.yaml").read_text())["datasources"]
    assert board["uid"] == f"rayscale-{file.stem}"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    names = {v["name"] for v in board["templating"]["list"]}
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies over another"
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= names
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(re.findall(r"\w+", target["expr"])) | {
                "instance", "GpuIndex"}  # fmt: skip


def test_prometheus_takes_config_and_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    for arguments in (["check", "config", "prometheus.yaml"], ["check", "rules", "rules.yaml"]):
        done = subprocess.run([promtool, *arguments], cwd=OBSERVABILITY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def _alarm(alert: str, at: str, series: dict[str, str], fires: bool, **labels: str) -> dict[str, Any]:
    (rule,) = (r for r in RULES if r["alert"] == alert)
    severity = rule["labels"]["severity"]
    expected = [{"exp_labels": {"severity": severity, **labels}}] if fires else []
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": expected}],
    }


def _requests(status: str) -> str:
    return f'ray_rayscale_requests_total{{route="/v1/upscale", model="m", status="{status}"}}'


SEEN = 'ray_rayscale_train_seen_images{run="r"}'
ENGINES = 'ray_serve_deployment_replica_healthy{application="a", deployment="Engine"}'
WANTED = 'ray_serve_autoscaling_target_replicas{application="a", deployment="Engine"}'
REFUSED = 'ray_rayscale_model_swaps_total{model="m", result="refused"}'
OK, FAILED, BUSY = _requests("200"), _requests("500"), _requests("503")
ALARMS = {
    "2 % errors": _alarm(
        "RayscaleErrors", "20m", {OK: "0+98x30", FAILED: "0+2x30"}, True, route="/v1/upscale", model="m"
    ),
    "0.5 % errors": _alarm("RayscaleErrors", "20m", {OK: "0+199x30", FAILED: "0+1x30"}, False),
    "refusals are no errors": _alarm("RayscaleErrors", "20m", {OK: "0+9x30", BUSY: "0+9x30"}, False),
    "refusing": _alarm("RayscaleRefusing", "30m", {OK: "0+9x40", BUSY: "0+1x40"}, True, route="/v1/upscale"),
    "a stalled run": _alarm("RayscaleTrainingStalled", "50m", {SEEN: "0+64x10 640x60"}, True, run="r"),
    "a run that goes on": _alarm("RayscaleTrainingStalled", "50m", {SEEN: "0+64x60"}, False),
    "a run that has ended": _alarm("RayscaleTrainingStalled", "50m", {SEEN: "0+64x20 _x60"}, False),
    "no engine": _alarm("RayscaleNoReplica", "10m", {ENGINES: "2x3 0x10"}, True, application="a", deployment="Engine"),
    "a pool that sleeps": _alarm("RayscaleNoReplica", "10m", {ENGINES: "1x3 0x10", WANTED: "1x3 0x10"}, False),
    "a pool that does not wake": _alarm(
        "RayscaleNoReplica", "10m", {ENGINES: "0x20", WANTED: "0x3 1x10"}, True, application="a", deployment="Engine"
    ),
    "one engine of two": _alarm("RayscaleNoReplica", "10m", {ENGINES: "2x3 1x10"}, False),
    "a version refused again": _alarm("RayscaleVersionRefused", "10m", {REFUSED: "1x5 2x20"}, True, model="m"),
    "the first one": _alarm("RayscaleVersionRefused", "30m", {REFUSED: "_x25 1x30"}, True, model="m"),
    "one of long ago": _alarm("RayscaleVersionRefused", "50m", {REFUSED: "_x5 1x60"}, False),
}


def test_alarms_go_off_when_they_should(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    rules = {"groups": [{"name": "all", "rules": [{**rule, "annotations": {}} for rule in RULES]}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": list(ALARMS.values())})
    )
    done = subprocess.run([promtool, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
