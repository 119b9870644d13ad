"""What tests share: small photos, a packed dataset, one Ray cluster a session, a home of their own."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # its ends and deaths are seen 2 s later otherwise
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny nets on cores that others work on: more threads wait for each other
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # CPU figures are promised to the bit; GPU checks ask for theirs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that is skipped for want of what RAYSCALE_REQUIRE names (`chromium,hadolint`) fails: CI installs it."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        for name in filter(None, os.environ.get("RAYSCALE_REQUIRE", "").split(",")):
            if re.search(rf"\b{re.escape(name)}\b", reason, re.IGNORECASE):
                report.outcome, report.longrepr = "failed", f"RAYSCALE_REQUIRE={name}: must be here. {reason}"
    return report


@pytest.fixture(scope="session", autouse=True)
def rayscale_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing of a test lands in the user's own home."""
    home = tmp_path_factory.mktemp("home")
    old = {k: os.environ.get(k) for k in ("RAYSCALE_HOME", "MLFLOW_TRACKING_URI")}
    os.environ["RAYSCALE_HOME"] = str(home)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{home}/mlflow.db"
    yield home
    for key, value in old.items():
        os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database to be copied: making its schema takes seconds."""
    from rayscale.tracking import connect

    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 real photos of 96..128 px cut from scikit-image's, as PNG and JPEG: train (12), validation (2), test (2)."""
    import cv2
    import skimage.data

    folder = tmp_path_factory.mktemp("photos")
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    for i in range(16):
        source = sources[i % 4]
        side = 96 + 8 * (i % 5)
        top, left = (37 * i) % (source.shape[0] - side), (53 * i) % (source.shape[1] - side)
        split = "train" if i < 12 else "validation" if i < 14 else "test"
        suffix = "png" if i % 2 else "jpg"
        path = folder / split / f"photo{i:02d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.ascontiguousarray(source[top : top + side, left : left + side, ::-1]))
    return folder


@pytest.fixture(scope="session")
def dataset(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packed `photo_folder`: URI of the dataset."""
    from rayscale.data.pack import pack
    from rayscale.data.scan import PackSettings

    out = tmp_path_factory.mktemp("packed") / "dataset"
    pack(str(photo_folder), str(out), PackSettings(split="folder", min_side=64))
    return str(out)


@pytest.fixture(scope="session")
def planned_chains(dataset: str) -> Callable[[str, Sequence[str]], dict[int, str]]:
    """(recipe, settings) -> {images seen: chain}, from the plan alone, without Ray, workers or checkpoints."""
    from rayscale import recipes
    from rayscale.data.mixture import open_mixture
    from rayscale.data.sample import render_window

    def compute(reference: str, settings: Sequence[str]) -> dict[int, str]:
        recipe = recipes.load(reference, settings)
        photos = open_mixture((dataset,), "train")
        plan = photos.plan(recipe.data)
        chain, found = "", {}
        for w in range(-(-recipe.run.total_steps(recipe.data.global_batch) // plan.rows)):
            shards = range(recipe.data.virtual_shards)
            rows = zip(*(render_window(photos, plan, w, v, 0, plan.rows) for v in shards), strict=True)
            for r, row in enumerate(rows):
                for batch in row:
                    chain = hashlib.sha256((chain + batch.sha256.hex()).encode()).hexdigest()
                found[(w * plan.rows + r + 1) * recipe.data.global_batch] = chain
        return found

    return compute


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """URL of an S3 server in a thread of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_server(moto: str) -> Iterator[tuple[str, str, str]]:
    """URL, key and secret of an S3 server; afterwards it is empty again."""
    yield moto, "key", "secret"
    urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", method="POST"))


@pytest.fixture
def s3(s3_server: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix in a bucket, and an environment in which boto3 finds it."""
    from rayscale import storage_s3

    url, key, secret = s3_server
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
                        "AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/none",
                        "AWS_CONFIG_FILE": "/none"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage_s3, "BACKOFF_S", 0.01)
    storage_s3.client().create_bucket(Bucket="photos")
    return "s3://photos/set"


@pytest.fixture
def faults(s3: str, s3_server: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A FaultProxy that S3 is reached through."""
    proxy = runpy.run_path(str(Path(__file__).with_name("fault_proxy.py")))["FaultProxy"](s3_server[0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture
def moto_auth(moto: str) -> Iterator[Callable[[bytes], None]]:
    """Let moto check credentials after so many requests; by default, and afterwards, it never does."""

    def check_after(unchecked_requests: bytes) -> None:
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset-auth", unchecked_requests, headers))

    yield check_after
    check_after(b"inf")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One local cluster with four logical CPUs for all tests that need Ray; yields its address."""
    import ray

    temp = tempfile.mkdtemp(prefix="rs", dir="/tmp")
    context = ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=400 << 20,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _temp_dir=temp,
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)
