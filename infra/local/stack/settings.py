"""One stack: its folder, ports and secrets, chosen once and kept; the environment of its nodes and users."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rayscale.errors import ResourceError

ROOT = Path(__file__).resolve().parents[3]
FIRST_PORT, LAST_PORT = 21_000, 29_900  # below what systems give to outgoing connections
PORTS = (
    "http", "dashboard", "mlflow", "s3", "postgres", "prometheus", "gcs", "account", "container", "object", "memcached",
    "haproxy_metrics", "haproxy_stats", "client", *(f"{kind}_{node}" for node in ("ray-head", "ray-1", "ray-2")
    for kind in ("agent", "metrics")),
)  # fmt: skip
ACCESS_KEY, BUCKET, DATABASE = "rayscale:stack", "rayscale", "mlflow"
WORKERS = ("ray-1", "ray-2")


@dataclass(frozen=True)
class Settings:
    """What was chosen when this stack was made."""

    state: Path
    ports: Mapping[str, int]
    s3_secret: str
    database_password: str
    ray_token: str

    @classmethod
    def open(cls, state: Path) -> Settings:
        """Those of `state`, made where there are none. Raises: ResourceError where no ports are free."""
        file = state / "settings.json"
        if file.exists():
            kept = json.loads(file.read_text())
            return cls(**{**kept, "state": state})
        state.mkdir(parents=True, exist_ok=True)
        made = cls(state, _free_ports(), *(secrets.token_hex(20) for _ in range(3)))
        file.touch(mode=0o600)
        file.write_text(json.dumps({**asdict(made), "state": str(state)}, indent=2))
        return made

    @property
    def short(self) -> Path:
        """A short name of the state folder: addresses of local sockets have 107 characters at most."""
        name = hashlib.sha256(str(self.state).encode()).hexdigest()[:8]
        return Path(tempfile.gettempdir()) / f"rs-{name}"

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}"

    @property
    def database_url(self) -> str:
        address = f"127.0.0.1:{self.ports['postgres']}/{DATABASE}"
        return f"postgresql+psycopg2://rayscale:{self.database_password}@{address}"

    @property
    def shared(self) -> dict[str, str]:
        """What users and nodes must know alike."""
        return {
            "AWS_ENDPOINT_URL": self.url("s3"),
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "RAY_API_SERVER_ADDRESS": self.url("dashboard"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.ray_token,
        }

    def node(self, name: str) -> dict[str, str]:
        """The environment of a server or node: like an image, with Rayscale on its path and a home of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "AWS_", "MLFLOW_", "VIRTUAL_ENV"))}
        haproxy = self.short / "h"
        return kept | self.shared | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(ROOT / "platform"),
            "PYTHONUNBUFFERED": "1",
            "RAYSCALE_HOME": str(self.state / "home" / name),
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A dead node is noticed in seconds instead of a minute.
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "10",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(self.ports["haproxy_metrics"]),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(self.ports["haproxy_stats"]),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }  # fmt: skip

    def write_env(self) -> Path:
        """A file for shells: `. FILE`, and `ray job submit`, `rayscale` and `mlflow` mean this stack."""
        file = self.state / "env.sh"
        file.touch(mode=0o600)
        path = f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"\n'
        file.write_text(path + "".join(f"export {key}={shlex.quote(value)}\n" for key, value in self.shared.items()))
        return file


def _free_ports() -> dict[str, int]:
    for first in range(FIRST_PORT, LAST_PORT, 100):
        ports = range(first, first + len(PORTS))
        if all(_is_free(port) for port in ports):
            return dict(zip(PORTS, ports, strict=True))
    raise ResourceError(
        "ports", f"{FIRST_PORT}..{LAST_PORT}", f"no {len(PORTS)} in a row are free", "stop what uses them"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
