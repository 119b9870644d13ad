"""The local stack (`infra/local/stack`) as its users see it: its command, jobs, the registry, the endpoint.

`runpy.run_path` loads it where tests need it: test folders are no packages.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

from rayscale.client import Client
from rayscale.registry.models import Registry

ROOT = Path(__file__).resolve().parents[1]
MODEL = "stack-x2"


@dataclass
class Stack:
    """A running stack as its users see it, and the figures that the tests found."""

    state: Path
    env: dict[str, str] = field(default_factory=dict)

    def do(self, *command: str) -> str:
        """`python infra/local/stack COMMAND`; what it said. Raises: RuntimeError."""
        argv = [sys.executable, "infra/local/stack", "--state", str(self.state), *command]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600)
        print(done.stdout + done.stderr, flush=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stdout

    def learn(self) -> None:
        """The environment that `env.sh` gives to a shell."""
        lines = (self.state / "env.sh").read_text().splitlines()
        given = dict(shlex.split(line)[1].split("=", 1) for line in lines if not line.startswith("export PATH="))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "AWS", "MLFLOW", "PYTHONPATH"))}
        self.env = kept | given
        settings = json.loads((self.state / "settings.json").read_text())
        self.env["URL"] = f"http://127.0.0.1:{settings['ports']['http']}"
        self.prometheus = f"http://127.0.0.1:{settings['ports']['prometheus']}"

    def submit(self, *command: str) -> Job:
        """`ray job submit ... -- python COMMAND`, as the README says."""
        argv = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".",
                "--runtime-env", "jobs/runtime_env.yaml", "--", "python", *command]  # fmt: skip
        return Job(subprocess.Popen(argv, cwd=ROOT, env=self.env, text=True, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT), command)  # fmt: skip

    def result(self, *command: str) -> dict[str, Any]:
        return self.submit(*command).result()

    @property
    def s3(self) -> Any:
        return boto3.client(
            "s3", endpoint_url=self.env["AWS_ENDPOINT_URL"], aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1",
        )  # fmt: skip

    @property
    def registry(self) -> Registry:
        return Registry(self.env["MLFLOW_TRACKING_URI"])

    def dashboard(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(self.env["RAY_API_SERVER_ADDRESS"] + path, headers=headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    def nodes_with(self, actor: str) -> set[str]:
        """Names of the nodes on which actors of that class, or part of a name, live."""
        nodes = {n["node_id"]: n["node_name"] for n in self.dashboard("/api/v0/nodes")["data"]["result"]["result"]}
        actors = self.dashboard("/api/v0/actors?limit=1000")["data"]["result"]["result"]
        return {
            nodes[a["node_id"]]
            for a in actors
            if a["state"] == "ALIVE" and actor in a["class_name"] + (a["name"] or "")
        }

    def committed(self, run: str) -> int:
        """Checkpoints of a run so far."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket="rayscale", Prefix=f"runs/{run}/")
        return sum(o["Key"].endswith("/checkpoint.json") for page in pages for o in page.get("Contents", ()))

    def champion(self) -> tuple[int, str]:
        version = self.registry.resolve(MODEL)
        return version.version, version.digest

    def served(self, picture: bytes) -> tuple[str, bytes]:
        """Digest and bytes of an answer."""
        with Client(self.env["URL"], timeout_s=60) as client:
            answer = client.upscale(picture, model=MODEL)
            return str(answer.digest), bytes(answer.data)

    def wait_served(self, digest: str, picture: bytes) -> float:
        began = time.monotonic()
        until(lambda: self.served(picture)[0] == digest, 120)
        return time.monotonic() - began


class Job:
    """A submitted job, its output read as it comes."""

    def __init__(self, process: subprocess.Popen[str], command: tuple[str, ...]) -> None:
        self.process, self.lines, self.began, self.seconds = process, [], time.monotonic(), 0.0
        self.name = Path(command[0]).stem
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
        self.seconds = time.monotonic() - self.began

    def said(self, text: str) -> bool:
        assert self.process.poll() is None, "\n".join(self.lines[-40:])
        return self.count(text) > 0

    def count(self, text: str) -> int:
        return sum(text in line for line in self.lines)

    def wait(self) -> int:
        code = self.process.wait(900)
        self._reader.join(30)
        print(f"job {self.name}: exit code {code} after {self.seconds:.0f} s", flush=True)
        return code

    def result(self) -> dict[str, Any]:
        """The JSON object on its last line."""
        assert self.wait() == 0, "\n".join(self.lines[-60:])
        return dict(json.loads([line for line in self.lines if line.startswith("{")][-1]))


def until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.25)
