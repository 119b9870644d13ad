"""What users mistype, and what they break off: one clear line and nothing half-done; and the same command again.

Every command is run as they would type it, in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from mlflow import MlflowClient

from rayscale.artifact import digest_of
from rayscale.data.pack import pack
from rayscale.data.scan import PackSettings
from rayscale.registry.models import Registry
from rayscale.storage import open_store
from rayscale.train.record import open_run, read_position

ROOT = Path(__file__).parents[2]
RECIPE = "rayscale.recipes.compact:tiny"
UNTIL_REFUSED_S = 60.0  # hung is what this tells apart, on a busy machine too
SETTINGS = ["task.features=24", "data.hr_crop_px=96", "run.keep_checkpoints=99", "gate.min_gain_db_over_baseline=-20",
            "gate.max_image_loss_db=20"]  # fmt: skip
"""Time to be killed in, and a gate that a model of seconds can pass."""


def python(*arguments: str | Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def environment(**changes: str | Path) -> dict[str, str]:
    """Where nothing is to start: nobody listens at this RAY_ADDRESS, so what goes as far as Ray complains of that."""
    paths = os.pathsep.join(filter(None, [str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": paths, "RAY_ADDRESS": "127.0.0.1:9", **{k: str(v) for k, v in changes.items()}}


class Refused(NamedTuple):
    """A command, the line that it must answer with (`...` stands for anything), and its exit code."""

    command: list[str]
    line: str
    env: Mapping[str, str | Path] = {}
    exit_code: int = 2


def check_all(*cases: Refused) -> None:
    """Two at a time: most of their time is imports."""
    with ThreadPoolExecutor(2) as pool:
        for case, done in zip(cases, pool.map(run_refused, cases), strict=True):
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, f"{case.command}: {done.stderr[-2000:]}"
            wanted = ".*".join(map(re.escape, f"error: {case.line}".split("...")))
            assert re.fullmatch(wanted, errors[0]), f"{errors[0]!r} instead of {case.line!r}"
            assert re.fullmatch(r"error: [^=]+=.+: .+; .+", errors[0]), "field=value: rule; remedy"
            assert done.returncode == case.exit_code
            assert "Traceback" not in done.stderr, done.stderr[-2000:]
            assert done.stdout == ""


def run_refused(case: Refused) -> subprocess.CompletedProcess[str]:
    env = environment(**case.env)
    return subprocess.run(case.command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=UNTIL_REFUSED_S)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def photos(folder: Path, number: int, side: int) -> Path:
    folder.mkdir()
    for i in range(number):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), pixels)
    return folder


def on_a_full_disk(size: str, folder: Path, command: list[str]) -> list[str]:
    """The command with an almost full file system at `folder`, which only its processes see."""
    folder.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", script, str(folder), *command]


@pytest.fixture(scope="session")
def mounts() -> None:
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no private mount namespaces here")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh RAYSCALE_HOME, tracking embedded in it."""
    monkeypatch.setenv("RAYSCALE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "home"


# ----------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_packed(tmp_path: Path, photo_folder: Path) -> None:
    out, empty, unreadable = tmp_path / "out", tmp_path / "empty", tmp_path / "unreadable"
    empty.mkdir()
    unreadable.mkdir()
    (unreadable / "a.jpg").write_text("no picture")
    (unreadable / "b.png").write_bytes(next((photo_folder / "train").glob("*.png")).read_bytes()[:1000])  # cut off
    tiny, missing, inside = photos(tmp_path / "tiny", 3, 16), tmp_path / "missing", photo_folder / "out"

    def ingest(source: Path, to: Path = out, *options: str) -> list[str]:
        return python("jobs/ingest.py", source, to, *options)

    remedy = "give a folder or s3://bucket/prefix of photos"
    check_all(
        Refused(ingest(missing), f"source={missing}: holds no files; {remedy}"),
        Refused(ingest(empty), f"source={empty}: holds no files; {remedy}"),
        Refused(ingest(unreadable), f"source={unreadable}: none of its 2 files is a usable photo...; ...the formats"),
        Refused(
            ingest(tiny), f"source={tiny}: none of...3 files...16x16: sides have at least 64 px...; ...--min-side..."
        ),
        Refused(ingest(photo_folder, inside), f"out={inside}: must lie outside the photos...; give another place"),
        Refused(ingest(tiny, out, "--shard-mb", "0"), "shard_bytes=0: must be 1 KiB to 1 GiB; 64 MiB is a good size"),
    )
    assert "manifest.json" not in files(out)
    assert not inside.exists()
    assert json.loads((out / "quarantine.json").read_text())["quarantined"], "why, photo by photo"

    again = subprocess.run(ingest(photo_folder), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert json.loads(again.stdout.splitlines()[-1])["status"] == "packed", "what was refused is not in the way"
    before = files(out)
    check_all(
        Refused(ingest(tiny, out, "--min-side", "8"), f"out={out}: holds a dataset of other photos...; give a new...")
    )
    assert files(out) == before


def test_buckets_that_are_not_there_and_keys_that_are_wrong(
    s3: str, moto_auth: Callable[[bytes], None], photo_folder: Path, dataset: str, home: Path
) -> None:
    out = "s3://photos/out"
    ingest, train = python("jobs/ingest.py"), python("jobs/train.py", "--recipe", RECIPE, "--data")
    no_bucket = "there is no such bucket; create it, or correct the address"
    check_all(
        Refused([*ingest, "s3://nowhere/photos", out], f"bucket=s3://nowhere/photos: {no_bucket}"),
        Refused([*ingest, str(photo_folder), "s3://nowhere/out"], f"bucket=s3://nowhere/out/...: {no_bucket}"),
        Refused([*ingest, s3, out], f"source={s3}: holds no files; give a folder or s3://bucket/prefix of photos"),
        Refused([*train, dataset, "--storage", "s3://nowhere/runs"], f"bucket=s3://nowhere/runs/...: {no_bucket}"),
    )
    moto_auth(b"0")
    refused = "access to...was refused (InvalidAccessKeyId...); check the credentials and what they may do"
    check_all(Refused([*ingest, s3, out], f"AWS_ACCESS_KEY_ID=key: {refused}"))
    moto_auth(b"inf")
    assert list(open_store("s3://photos").list()) == []
    assert not home.exists()


def test_what_cannot_be_trained(dataset: str, tmp_path: Path, home: Path) -> None:
    small, nowhere, storage = str(tmp_path / "small"), str(tmp_path / "nowhere"), tmp_path / "runs"
    pack(str(photos(tmp_path / "photos", 12, 24)), small, PackSettings(min_side=16))
    train = python("jobs/train.py", "--storage", storage, "--recipe")
    tiny, good = [*train, RECIPE], [*train, RECIPE, "--data", dataset]
    check_all(
        Refused(
            [*train, "rayscale.recipes.compact:tinny"], f"--recipe=...:tinny: no such...; did you mean '{RECIPE}'?"
        ),
        Refused(
            [*good, "--set", "run.total_image=8"],
            "--set=run.total_image: no such path in this recipe; did you mean 'run.total_images'?",
        ),
        Refused(
            [*good, "--set", "run.total_images=lots"], "--set run.total_images=lots: ...integer...; ...of type int"
        ),
        Refused(
            [*good, "--set", "data.window_images=32", "--set", "data.micro_batch=16"],
            "data.window_images=32: a window takes 32 images...which has 12: too few...; pack more photos...",
        ),
        Refused([*tiny, "--data", nowhere], f"data={nowhere}: holds no manifest.json; pack...`rayscale ingest`"),
        Refused([*tiny, "--data", small], "data.hr_crop_px=32: exceeds the smallest photo...; ...--min-side 32"),
    )
    assert not home.exists(), "MLflow heard of nothing"
    silent = "http://127.0.0.1:9"
    check_all(  # the control: what is right goes as far as the services
        Refused(
            good,
            f"MLFLOW_TRACKING_URI={silent}: [Errno 111] Connection refused; check that MLflow is up...",
            {"MLFLOW_TRACKING_URI": silent},
            exit_code=1,
        ),
        Refused(good, "RAY_ADDRESS=127.0.0.1:9: ...Connection refused; ...`ray start --head`...", exit_code=1),
        Refused(good, "RAY_ADDRESS=here: ...; give HOST:PORT of the cluster's head", {"RAY_ADDRESS": "here"}),
    )
    assert not storage.exists()
    assert files(home) == {"mlflow.db"}
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    assert client.search_runs([e.experiment_id for e in client.search_experiments()]) == []


@pytest.mark.usefixtures("mounts")
def test_disks_that_are_too_small(dataset: str, photo_folder: Path, tmp_path: Path, home: Path) -> None:
    """What is known before the work; a disk that fills up meanwhile is under test with storage."""
    full, storage = tmp_path / "full", tmp_path / "runs"
    ingest = python("jobs/ingest.py", photo_folder, full / "out")
    train = python("jobs/train.py", "--recipe", RECIPE, "--data", dataset, "--storage")
    promote = python("jobs/promote.py", "photos-x2")
    remedy = "free some space or choose another place"
    check_all(
        Refused(
            on_a_full_disk("64k", full, ingest),
            f"disk={full}/out: the dataset needs 1 MiB, the disk has 0 MiB free; {remedy}",
        ),
        Refused(
            on_a_full_disk("1m", full, [*train, str(full / "runs")]),
            f"disk={full}/runs/...: the run needs 16 MiB, the disk has 1 MiB free; {remedy}",
        ),
        Refused(
            on_a_full_disk("1m", full, [*train, str(storage)]),
            f"disk={full}: scratch (TMPDIR) needs 16 MiB...; {remedy}",
            {"TMPDIR": full},
        ),
        Refused(
            on_a_full_disk("1m", full, promote),
            f"disk={full}/home: MLflow with its artifacts needs 16 MiB...; {remedy}",
            {"RAYSCALE_HOME": full / "home"},
        ),
    )
    assert not storage.exists()
    assert not home.exists()


def test_a_demo_whose_port_is_taken(tmp_path: Path) -> None:
    demo = python("infra/local/demo.py", "--out", tmp_path / "out", "--port")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        check_all(
            Refused([*demo, port], f"--port={port}: is in use by another program; stop it, or `make demo PORT=..."),
            Refused([*demo, "99999"], "--port=99999: must be 1 to 65535; ...`make demo PORT=..."),
        )
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- broken off


class Line:
    """The whole line on one home: a run that was broken off twice, and what comes of it."""

    def __init__(self, folder: Path, dataset: str, ray_address: str) -> None:
        self.home, self.storage = folder / "home", folder / "runs"
        self.run = self.storage / "broken"
        self.tracking_uri = f"sqlite:///{self.home}/mlflow.db"
        self.env = environment(RAYSCALE_HOME=self.home, MLFLOW_TRACKING_URI=self.tracking_uri, RAY_ADDRESS=ray_address)
        self.log = folder / "stderr"
        self.train = python("jobs/train.py", "--recipe", RECIPE, "--data", dataset, "--storage", self.storage,
                            "--name", "broken", "--cpus-per-worker", "0.5", "--threads", "1",
                            *(word for setting in SETTINGS for word in ("--set", setting)))  # fmt: skip
        self.publish = python("jobs/publish.py", self.run, "--name", "photos-x2", "--licence", "MIT")
        self.promote = python("jobs/promote.py", "photos-x2")

    def complete(self, command: list[str]) -> dict[str, Any]:
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def break_off(self, command: list[str], how: signal.Signals, moment: Callable[[], bool], delay_s: float) -> int:
        """Start, wait for the moment and a little longer, signal the driver alone. Returns its exit code."""
        with self.log.open("wb") as log:
            driver = subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 200
            while not moment():
                assert driver.poll() is None, f"it ended before: {self.said()[-3000:]}"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(delay_s)
            driver.send_signal(how)
            return driver.wait(60)
        finally:
            driver.kill()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def committed(self) -> int:
        return len(list(self.run.glob("checkpoint_*/checkpoint.json")))


@pytest.fixture(scope="module")
def line(dataset: str, ray_cluster: str, mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Line:
    found = Line(tmp_path_factory.mktemp("line"), dataset, ray_cluster)
    found.home.mkdir()
    shutil.copy(mlflow_template, found.home)
    return found


class Trained(NamedTuple):
    result: dict[str, Any]
    exit_codes: list[int]
    said: str  # by the one that met Ctrl-C
    run_ids: list[str]  # of MLflow, after each start
    statuses: list[str]  # likewise


@pytest.fixture(scope="module")
def trained(line: Line) -> Trained:
    """Ctrl-C after the first checkpoint; SIGKILL after a further one; then to its end, at once after the kill."""
    client, exit_codes, said, run_ids, statuses = MlflowClient(line.tracking_uri), [], "", [], []
    for how in (signal.SIGINT, signal.SIGKILL):
        before = line.committed()
        snapshot = line.run / "checkpoint_manager_snapshot.json"  # Ray Train's own memory of the run is to be met too
        moment = lambda: line.committed() > before and snapshot.exists()  # noqa: B023, E731
        exit_codes.append(line.break_off(line.train, how, moment, 0.0))
        said = said or line.said()
        run_ids.append(open_run(str(line.run)).mlflow_run_id)
        statuses.append(client.get_run(run_ids[-1]).info.status)
    result = line.complete(line.train)
    run_ids.append(result["mlflow_run_id"])
    statuses.append(client.get_run(run_ids[-1]).info.status)
    return Trained(result, exit_codes, said, run_ids, statuses)


@pytest.mark.long
@pytest.mark.ray
def test_a_broken_training_goes_on(
    line: Line, trained: Trained, planned_chains: Callable[[str, Sequence[str]], dict[int, str]]
) -> None:
    assert trained.exit_codes == [130, -signal.SIGKILL]
    assert "\ninterrupted: nothing half-done was published; the same command goes on from here\n" in trained.said
    assert not re.search("^Traceback", trained.said, re.MULTILINE)  # Ray's actors speak indented by their names
    steps = [start.step for start in read_position(str(line.run)).starts]
    assert len(steps) == 3
    assert 0 == steps[0] < steps[1] < steps[2] < 128, "each start went on from a further checkpoint"
    chains = planned_chains(RECIPE, SETTINGS)
    assert (trained.result["images_seen"], trained.result["chain"]) == (1024, chains[1024])
    assert trained.result["psnr_y"] > 20
    assert len(set(trained.run_ids)) == 1
    assert trained.statuses == ["KILLED", "RUNNING", "FINISHED"]
    history = MlflowClient(line.tracking_uri).get_metric_history(trained.run_ids[0], "loss/l1")
    assert [m.step for m in history] == list(range(128, 1025, 128)), "every step once"


@pytest.mark.long
@pytest.mark.ray
def test_what_cannot_be_published_and_promoted(line: Line, trained: Trained, tmp_path: Path) -> None:
    nowhere, bare, run = str(tmp_path / "nowhere"), tmp_path / "bare", str(line.run)
    bare.mkdir()
    shutil.copy(line.run / "run.json", bare)  # as a run that was killed before its first checkpoint
    publish, promote = python("jobs/publish.py", "--name", "photos-x2"), python("jobs/promote.py")
    env = {"RAYSCALE_HOME": line.home, "MLFLOW_TRACKING_URI": line.tracking_uri}
    check_all(
        Refused([*publish, nowhere], f"run={nowhere}: no run.json there; give the folder that `train` printed...", env),
        Refused([*publish, str(bare)], f"checkpoint={bare}: the run has none; train first...", env),
    )
    assert Registry(line.tracking_uri).names() == ()

    published = line.complete([*python("jobs/publish.py", run), "--name", "unlicensed"])
    assert published["version"] == 1
    held = "promote=unlicensed:1 -> champion: licence: missing, must be stated; the report is MLflow run ..."
    check_all(
        Refused([*promote, "unlicenced"], "model=unlicenced: no such model...; did you mean 'unlicensed'?", env),
        Refused([*promote, "unlicensed"], held, env, exit_code=3),
    )
    assert Registry(line.tracking_uri).aliases("unlicensed") == {}


@pytest.mark.long
@pytest.mark.ray
def test_a_broken_publication_and_promotion_go_on(line: Line, trained: Trained) -> None:
    """SIGKILL three times each, at random moments from where they begin to change anything."""
    rng, registry = random.Random(0), Registry(line.tracking_uri)
    digests = set()

    def uploading() -> bool:
        return any(line.home.glob("mlartifacts/*/artifacts/models/photos-x2-*"))

    def sound() -> dict[str, int]:
        """Whatever was cut off: at most one version, whole; and the aliases."""
        if "photos-x2" not in registry.names():
            return {}
        versions = registry.versions("photos-x2")
        assert [v.version for v in versions] in ([], [1])
        digests.update(v.digest for v in versions)
        assert all(digest_of(Path(v.uri.removeprefix("file://"))) == v.digest for v in versions)
        return registry.aliases("photos-x2")

    for moment in (lambda: "exporting" in line.said(), lambda: "held-out" in line.said(), uploading):
        code = line.break_off(line.publish, signal.SIGKILL, moment, rng.uniform(0, 0.2))
        assert code == -signal.SIGKILL
        assert sound() == {}
    published = line.complete(line.publish)
    assert (published["version"], sound()) == (1, {})
    assert digests == {published["digest"]}

    for longest_s in (0.1, 0.4, 0.8):
        registry.client.delete_registered_model_alias("photos-x2", "champion")
        line.break_off(line.promote, signal.SIGKILL, lambda: "-> champion" in line.said(), rng.uniform(0, longest_s))
        assert sound() in ({}, {"champion": 1})
    promoted = line.complete(line.promote)
    assert promoted["promoted"] or promoted["already"]
    assert sound() == {"champion": 1}
