"""`ray job submit` of all jobs: token authentication, S3 over HTTP, nothing of rayscale on the cluster's side."""

from __future__ import annotations

import json
import os
import runpy
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pytest

from rayscale import artifact, imaging
from rayscale.registry.models import Registry

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Cluster:
    """A Ray head of its own whose Python knows every library but rayscale, beside an S3 server."""

    python: Path
    env: dict[str, str]
    temp: Path

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit ... -- python COMMAND`, as the README says."""
        return subprocess.run(
            [
                sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".",
                "--runtime-env", "jobs/runtime_env.yaml", "--", "python", *command,
            ],
            cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    def result(self, *command: str) -> dict[str, Any]:
        """The JSON object on the job's last line."""
        done = self.submit(*command)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return dict(json.loads(lines[-1]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bare_python(folder: Path) -> Path:
    """A virtual environment that sees the installed libraries, but not the editable install of rayscale.

    A `.pth` file names a folder; the `.pth` files inside that folder are not followed.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin/python"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """URL of an S3 server in a process of its own, with the bucket "jobs"."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(150):
            try:
                urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=2)
                break
            except OSError:
                time.sleep(0.2)
        client(url).create_bucket(Bucket="jobs")
        yield url
    finally:
        server.terminate()
        server.wait(20)


def client(url: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3_server: str, mlflow_template: Path) -> Iterator[Cluster]:
    temp = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
    python = bare_python(tmp_path_factory.mktemp("bare") / "venv")
    home = tmp_path_factory.mktemp("cluster")
    shutil.copy(mlflow_template, home)
    dashboard = free_port()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "RAYSCALE_HOME")} | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
        "RAYSCALE_HOME": str(home),
    }
    log = (home / "ray.log").open("w")
    head = subprocess.Popen(
        [
            python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", f"--port={free_port()}", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
            "--num-cpus=4", f"--object-store-memory={300 << 20}",
            f"--temp-dir={temp}", "--no-monitor",
        ],
        cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        cluster = Cluster(python, env, temp)
        wait_for_jobs(cluster, head, home / "ray.log")
        yield cluster
    finally:
        family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        _, alive = psutil.wait_procs([psutil.Process(head.pid), *family], timeout=3)  # some never listen
        for process in alive:
            process.kill()
        head.wait()
        shutil.rmtree(temp, ignore_errors=True)


def wait_for_jobs(cluster: Cluster, head: subprocess.Popen[bytes], log: Path) -> None:
    """Until the cluster takes and runs a job. By HTTP: the command's own start takes seconds of every try."""
    jobs = f"{cluster.env['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    headers = {"Authorization": f"Bearer {cluster.env['RAY_AUTH_TOKEN']}", "Content-Type": "application/json"}

    def ask(url: str, body: bytes | None = None) -> dict[str, Any]:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
            return dict(json.load(answer))

    said, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()[-3000:]
        try:
            job = ask(jobs, b'{"entrypoint": "true"}')["submission_id"]
            while (said := ask(f"{jobs}{job}")["status"]) in ("PENDING", "RUNNING"):
                time.sleep(0.1)
            if said == "SUCCEEDED":
                return
        except OSError as error:  # nobody listens yet, or its agent does not
            said = str(error)
        time.sleep(0.3)
    raise AssertionError(said + log.read_text()[-2000:])


def test_the_clusters_python_has_no_rayscale(cluster: Cluster) -> None:
    """Negative control: what the jobs import comes from their runtime environment."""
    code = "import ray, torch; import importlib.util as u; print(u.find_spec('rayscale'))"
    env = {k: v for k, v in cluster.env.items() if k != "PYTHONPATH"}
    done = subprocess.run([cluster.python, "-c", code], env=env, cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == "None", done.stderr


def test_without_the_token_nothing_is_submitted(cluster: Cluster) -> None:
    wrong = Cluster(cluster.python, cluster.env | {"RAY_AUTH_TOKEN": "0" * 64}, cluster.temp)
    done = wrong.submit("jobs/train.py", "--help")
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()


TINY = (
    "jobs/train.py", "--recipe", "rayscale.recipes.compact:tiny", "--data", "s3://jobs/packed",
    "--storage", "s3://jobs/runs", "--set", "run.total_images=256", "--set", "gate.min_gain_db_over_baseline=-9",
    "--set", "gate.max_image_loss_db=9", "--set", "gate.also_margin=0.9",
)  # fmt: skip
"""A gate that a model of a few seconds passes; what the real one decides is tested elsewhere."""


def test_photos_in_a_bucket_become_a_champion(cluster: Cluster, photo_folder: Path) -> None:
    s3 = client(cluster.env["AWS_ENDPOINT_URL"])
    for photo in sorted(photo_folder.rglob("*.*")):
        s3.upload_file(str(photo), "jobs", f"photos/{photo.relative_to(photo_folder)}")

    packed = cluster.result("jobs/ingest.py", "s3://jobs/photos", "s3://jobs/packed", "--split", "folder")
    assert (packed["train"], packed["validation"], packed["test"]) == (12, 2, 2)

    trained = cluster.result(*TINY, "--workers", "2", "--cpus-per-worker", "0.5")
    assert trained["images_seen"] == 256
    assert trained["run_uri"].startswith("s3://jobs/runs/")

    published = cluster.result("jobs/publish.py", trained["run_uri"], "--name", "jobs-x2", "--licence", "CC0-1.0")
    assert published["version"] == 1
    assert published["parity_max_abs"] < 1e-4

    promoted = cluster.result("jobs/promote.py", "jobs-x2")
    assert (promoted["promoted"], promoted["version"], promoted["digest"]) == (True, 1, published["digest"])


@pytest.mark.long
def test_a_bucket_of_pictures_goes_through_a_registered_model(cluster: Cluster, tmp_path: Path) -> None:
    """Actors that find the model by its digest; one picture that is none; the same job again makes nothing."""
    small = runpy.run_path(str(ROOT / "tests/small_onnx.py"))
    small["write"](tmp_path / "model")
    Registry(cluster.env["MLFLOW_TRACKING_URI"]).publish("bulk", tmp_path / "model")
    s3, session = client(cluster.env["AWS_ENDPOINT_URL"]), artifact.load(tmp_path / "model")
    expected = {}
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 700, 3), np.uint8)
        s3.put_object(Bucket="jobs", Key=f"small/{i % 2}/p{i}.png", Body=imaging.encode(pixels, "png"))
        expected[f"large/{i % 2}/p{i}.png"] = imaging.to_hwc_u8(session.transform(imaging.to_nchw_f32(pixels)))
    s3.put_object(Bucket="jobs", Key="small/broken.png", Body=b"no picture")

    job = "jobs/upscale.py", "s3://jobs/small", "s3://jobs/large", "--model", "bulk:1", "--workers", "2"
    done = cluster.submit(*job)
    assert done.returncode != 0, "one picture was not made"
    made = cluster.result(*job, "--error-budget", "0.2")
    assert (made["made"], made["skipped"], made["failed"]) == (0, 5, 1)
    found = {o["Key"]: s3.get_object(Bucket="jobs", Key=o["Key"])["Body"].read()
             for o in s3.list_objects_v2(Bucket="jobs", Prefix="large/")["Contents"]}  # fmt: skip
    for key, pixels in expected.items():
        np.testing.assert_array_equal(imaging.decode_rgb(found[key]), pixels)
    (failed,) = json.loads(found["large/errors.json"])
    assert failed["key"] == "broken.png"


def test_a_users_mistake_fails_the_job_with_its_one_line(cluster: Cluster) -> None:
    done = cluster.submit("jobs/train.py", "--recipe", "rayscale.recipes.compact:tinny", "--data", "s3://jobs/x")
    assert done.returncode != 0
    assert "did you mean 'rayscale.recipes.compact:tiny'?" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


def test_dry_run_prints_the_resolved_recipe(cluster: Cluster) -> None:
    recipe = ("--recipe", "rayscale.recipes.compact:tiny", "--set", "task.features=5")
    done = cluster.submit("jobs/train.py", *recipe, "--dry-run")
    assert done.returncode == 0
    assert '"features": 5' in done.stdout
