"""The production-shaped stack of `infra/local/stack`, from nothing; a model's life on it as jobs; parts of it killed.

In the order of the file, on one stack. RAYSCALE_TEST_STACK names the folder of one that is there already and stays.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from rayscale import artifact
from rayscale.client import Client
from rayscale.registry.journal import Entry

ROOT = Path(__file__).resolve().parents[2]
U8 = NDArray[np.uint8]
pytestmark = [pytest.mark.stack, pytest.mark.timeout(1500)]

user, promoters = (runpy.run_path(str(ROOT / f"tests/{name}.py")) for name in ("stack_user", "promoters"))
Stack, until, MODEL = user["Stack"], user["until"], user["MODEL"]
IMAGES = 2048  # of a run; a checkpoint every 256
TRAIN = (
    "jobs/train.py", "--recipe", "rayscale.recipes.compact:tiny", "--data", "s3://rayscale/packed",
    "--storage", "s3://rayscale/runs", "--workers", "2", "--min-workers", "1", "--cpus-per-worker", "1.5",
    "--threads", "1", "--set", f"run.total_images={IMAGES}", "--set", "run.keep_checkpoints=99",
    "--set", "gate.min_gain_db_over_baseline=-9", "--set", "gate.margin_vs_champion=9",
    "--set", "gate.max_image_loss_db=9", "--set", "gate.also_margin=0.9",
)  # fmt: skip
"""A gate that a model of a minute passes; what the real one decides is tested elsewhere."""


def png(pixels: U8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """Whole ones, and one that is cut into tiles."""
    rng = np.random.default_rng(5)
    return [png(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((40, 56), (97, 33), (700, 500))]


PICTURES = pictures()


def keeps(stack: Stack) -> None:
    if os.environ.get("RAYSCALE_TEST_STACK"):
        pytest.skip("it would take away the stack that was given")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    given = os.environ.get("RAYSCALE_TEST_STACK")
    state = Path(given or tempfile.mkdtemp(prefix="rs", dir="/tmp"))
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o755)  # PostgreSQL is not run by root, and must find its folder
    stack = Stack(state)
    try:
        began = time.monotonic()
        try:
            stack.do("up")
        except RuntimeError as error:
            if re.search(r"stack=\d+ missing", str(error)):
                pytest.skip(str(error))
            raise
        print(f"up from nothing after {time.monotonic() - began:.0f} s")
        stack.learn()
        yield stack
    finally:
        if not given:
            stack.do("wipe")
            shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="module")
def photos(stack: Stack, photo_folder: Path) -> None:
    for photo in sorted(photo_folder.rglob("*.*")):
        stack.s3.upload_file(str(photo), "rayscale", f"photos/{photo.relative_to(photo_folder)}")


def once(stack: Stack, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` made; on a stack that stays, what it made then."""
    file = stack.state / f"tests/{name}.json"
    if not file.exists():
        made = make()
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(made))
    return dict(json.loads(file.read_text()))


@pytest.fixture(scope="module")
def first(stack: Stack, photos: None) -> dict[str, Any]:
    """Ingested, trained, published, promoted: what the tests below start from. Its chain is that of all like it."""
    return once(stack, "first", lambda: make_first(stack))


def make_first(stack: Stack) -> dict[str, Any]:
    packed = stack.result("jobs/ingest.py", "s3://rayscale/photos", "s3://rayscale/packed", "--split", "folder")
    assert (packed["train"], packed["validation"], packed["test"]) == (12, 2, 2)
    trained = stack.result(*TRAIN, "--name", "first")
    assert trained["images_seen"] == IMAGES
    return trained | publish_and_promote(stack, trained["run_uri"])


def publish_and_promote(stack: Stack, run_uri: str) -> dict[str, Any]:
    published = stack.result("jobs/publish.py", run_uri, "--name", MODEL, "--licence", "CC0-1.0")
    promoted = stack.result("jobs/promote.py", f"{MODEL}:{published['version']}")
    assert promoted["digest"] == published["digest"]
    return {"version": published["version"], "digest": published["digest"]}


@pytest.fixture(scope="module")
def second(stack: Stack, first: dict[str, Any]) -> dict[str, Any]:
    """Another version, published only."""
    return once(stack, "second", lambda: make_second(stack))


@pytest.fixture(scope="module")
def many(stack: Stack) -> str:
    """A dataset that takes some time to score."""
    rng = np.random.default_rng(6)
    for i in range(150):
        photo = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (384, 384, 3), np.uint8)).save(photo, "JPEG")
        stack.s3.put_object(Bucket="rayscale", Key=f"many-photos/test/{i}.jpg", Body=photo.getvalue())
    packed = stack.result("jobs/ingest.py", "s3://rayscale/many-photos", "s3://rayscale/many", "--split", "folder")
    assert packed["test"] == 150
    return "s3://rayscale/many"


def make_second(stack: Stack) -> dict[str, Any]:
    changed = ("--set", "task.optimizer.learning_rate=0.002", "--set", "run.total_images=512")
    trained = stack.result(*TRAIN, *changed, "--name", "second")
    return stack.result("jobs/publish.py", trained["run_uri"], "--name", MODEL, "--licence", "CC0-1.0")


def run_of(stack: Stack, digest: str, tmp_path: Path, picture: bytes) -> U8:
    """What the registered artifact makes of a picture, without any of our serving."""
    import onnxruntime

    version = next(v for v in stack.registry.versions(MODEL) if v.digest == digest)
    with environment(stack.env):
        folder = stack.registry.fetch(version, tmp_path)
    assert artifact.digest_of(folder) == digest
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    x = np.asarray(Image.open(io.BytesIO(picture))).astype(np.float32) / np.float32(255)
    y = session.run(None, {session.get_inputs()[0].name: x.transpose(2, 0, 1)[None]})[0][0].transpose(1, 2, 0)
    return np.rint(np.clip(y, 0, 1) * np.float32(255)).astype(np.uint8)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def test_every_part_is_healthy_and_says_so(stack: Stack) -> None:
    lines = stack.do("status").splitlines()
    assert len(lines) == 12
    assert all(" healthy" in line for line in lines), lines
    stack.do("up")
    assert stack.do("status").splitlines() == lines, "the same processes: nothing was started twice"


def test_a_models_life_as_jobs(stack: Stack, first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    took = stack.wait_served(first["digest"], PICTURES[0])
    print(f"the first champion was served {took:.1f} s after its promotion was looked for")
    for picture in PICTURES:
        digest, data = stack.served(picture)
        assert digest == first["digest"]
        answer = np.asarray(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(answer, run_of(stack, first["digest"], tmp_path, picture))
        assert not np.array_equal(answer, run_of(stack, second["digest"], tmp_path, picture)), "it would be seen"

    assert stack.result("jobs/promote.py", f"{MODEL}:{second['version']}")["promoted"]
    print(f"promotion in serving after {stack.wait_served(second['digest'], PICTURES[0]):.1f} s")
    stack.result("jobs/models.py", "rollback", MODEL, "--reason", "a drill")
    print(f"rollback in serving after {stack.wait_served(first['digest'], PICTURES[0]):.1f} s")
    assert stack.champion() == (first["version"], first["digest"])


def test_prometheus_sees_every_node_and_our_own_figures(stack: Stack, first: dict[str, Any]) -> None:
    stack.wait_served(first["digest"], PICTURES[0])

    def ask(path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{stack.prometheus}/api/v1/{path}", timeout=20) as answer:
            return dict(json.loads(answer.read())["data"])

    def found(query: str) -> list[str]:
        return [each["value"][1] for each in ask(f"query?query={query}")["result"]]

    until(lambda: found("up").count("1") >= 4)  # three nodes and HAProxy
    until(lambda: bool(found("ray_rayscale_requests_total")))
    assert found("ray_rayscale_no_such_metric") == []  # negative control
    alerts = {rule["name"] for group in ask("rules")["groups"] for rule in group["rules"]}
    assert {"RayscaleErrors", "RayNodeDown"} <= alerts


def test_a_node_killed_during_training_costs_no_sample(stack: Stack, first: dict[str, Any]) -> None:
    job = stack.submit(*TRAIN, "--name", "node-killed")
    until(lambda: job.said("from image 0") and stack.committed("node-killed") >= 3, 300)
    lost = min(stack.nodes_with("RayTrainWorker") - {"ray-head"}, default="")
    if not lost:
        job.result()
        pytest.skip("both workers were placed on the head")
    stack.do("kill", lost)
    try:
        assert job.result()["chain"] == first["chain"], "the same samples in the same order"
    finally:
        stack.do("up")
    starts = [line for line in job.lines if "from image" in line]
    assert len(starts) > 1, "it was a worker's node"
    assert "from image 0" not in starts[-1], "it went on from a checkpoint"
    print("\n".join(starts))


def test_the_store_away_for_30_s_during_training_costs_no_sample(stack: Stack, first: dict[str, Any]) -> None:
    job = stack.submit(*TRAIN, "--name", "store-away")
    until(lambda: job.said("from image 0") and stack.committed("store-away") >= 3, 300)
    stack.do("kill", "s3-proxy", "s3-account", "s3-container", "s3-object", "memcached")
    digest, _ = stack.served(PICTURES[0])
    assert digest == first["digest"], "serving does not need the store"
    time.sleep(30)  # the outage, not a wait
    stack.do("up", "s3-proxy", "s3-account", "s3-container", "s3-object", "memcached")
    assert job.result()["chain"] == first["chain"]
    print("\n".join(line for line in job.lines if "from image" in line))


def test_the_database_restarted_during_training_costs_no_record(stack: Stack, first: dict[str, Any]) -> None:
    job = stack.submit(*TRAIN, "--name", "database-restarted")
    until(lambda: job.said("from image 0") and stack.committed("database-restarted") >= 3, 300)
    stack.do("restart", "postgres")
    result = job.result()
    assert result["chain"] == first["chain"]
    client = stack.registry.client
    runs = [client.get_run(found["mlflow_run_id"]) for found in (result, first)]
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    steps = [{m.step for m in client.get_metric_history(run.info.run_id, "validation/psnr_y")} for run in runs]
    assert steps[0] == steps[1] != set(), "every validation is on record"
    assert stack.champion() == (first["version"], first["digest"])


@pytest.mark.parametrize("moment", ["scoring", "recorded"])
def test_mlflow_killed_during_a_promotion(
    stack: Stack, first: dict[str, Any], second: dict[str, Any], many: str, moment: str
) -> None:
    """What is served is a champion that was promised, before, during and after; the same command ends it."""
    stack.registry.client.set_registered_model_alias(MODEL, "champion", str(first["version"]))
    stack.wait_served(first["digest"], PICTURES[0])

    def promotions() -> int:
        found = stack.registry.client.get_experiment_by_name("promotions")
        return 0 if found is None else len(stack.registry.client.search_runs([found.experiment_id]))

    before = promotions()
    command = ("jobs/promote.py", f"{MODEL}:{second['version']}", *(("--photos", many) if moment == "scoring" else ()))
    job = stack.submit(*command)
    until((lambda: job.said(" images (")) if moment == "scoring" else (lambda: promotions() > before))
    scored = job.count(" images (")
    stack.do("kill", "mlflow")
    assert stack.served(PICTURES[0])[0] in (first["digest"], second["digest"])
    code = job.wait()
    assert stack.served(PICTURES[0])[0] in (first["digest"], second["digest"]), "it serves without MLflow"
    print(f"{moment}: the job's exit code was {code}; its last lines: {job.lines[-8:]}")
    if moment == "scoring":
        assert job.count(" images (") > scored, "it was killed while it scored"
        assert any("error: MLFLOW_TRACKING_URI" in line and "run this again" in line for line in job.lines), job.lines
    stack.do("up")
    moved = stack.champion()[1] == second["digest"]
    assert moved or code != 0, "a promotion that said yes has happened"
    assert not moved or moment != "scoring"
    again = stack.result(*command)
    assert again["promoted"] or again.get("already"), again
    stack.wait_served(second["digest"], PICTURES[0])
    assert stack.champion() == (second["version"], second["digest"])
    assert stack.result("jobs/models.py", "history", MODEL)["moved_by_hand"] == {}, "journal and alias agree"


def test_of_two_promoters_at_once_one_wins(stack: Stack) -> None:
    """Its negative control is beside the same race in tests/contract/test_journal.py."""
    registry, before, won, lost = stack.registry, None, 0, []
    versions = promoters["model"](registry, name := f"raced-{time.time_ns()}")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            told = promoters["raced"](registry, versions, before, pool, "raced")
            winners = [one for one in told if isinstance(one, Entry)]
            lost += [one for one in told if not isinstance(one, Entry)]
            assert len(winners) <= 1
            promoters["agreed"](registry, name, "raced")
            before = registry.aliases(name).get("raced")
            assert not winners or before == winners[0].to
            won += len(winners)
    kinds = Counter(type(one).__name__ for one in lost)
    print(f"20 races of two promoters on PostgreSQL: {won} had a winner; the others were told {dict(kinds)}")
    assert won > 0
    assert kinds.keys() <= {"ConflictError", "UnavailableError"}, lost


def test_a_node_killed_under_load_costs_no_answer(stack: Stack, first: dict[str, Any]) -> None:
    stack.registry.client.set_registered_model_alias(MODEL, "champion", str(first["version"]))
    stack.wait_served(first["digest"], PICTURES[0])
    wanted = [stack.served(picture) for picture in PICTURES]
    wrong: list[str] = []
    answered, slowest_s = [0, 0, 0], [0.0]
    stop = threading.Event()

    def load(which: int) -> None:
        with Client(stack.env["URL"], timeout_s=120) as client:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    answer = client.upscale(PICTURES[which], model=MODEL)
                    if (answer.digest, answer.data) != wanted[which]:
                        wrong.append(f"{which}: another answer")
                except Exception as error:
                    wrong.append(f"{which}: {error}")
                slowest_s[0] = max(slowest_s[0], time.monotonic() - began)
                answered[which] += 1
                stop.wait(0.2)

    threads = [threading.Thread(target=load, args=(which,)) for which in (0, 1, 2, 0)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: min(answered) > 5)
        stack.do("kill", min(stack.nodes_with("#Engine#") - {"ray-head"}))
        seen = list(answered)
        until(lambda: all(now > then + 20 for now, then in zip(answered, seen, strict=True)), 300)
        stack.do("up")
        seen = list(answered)
        until(lambda: all(now > then + 5 for now, then in zip(answered, seen, strict=True)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    print(f"{sum(answered)} answers, the slowest after {slowest_s[0]:.1f} s, retries included")
    assert wrong == []
    stack.do("status")


def test_a_backup_restored_into_an_empty_stack_is_the_same_platform(
    stack: Stack, first: dict[str, Any], tmp_path: Path
) -> None:
    keeps(stack)
    digests = [stack.served(picture) for picture in PICTURES]
    champion, versions = stack.champion(), [(v.version, v.digest, v.aliases) for v in stack.registry.versions(MODEL)]
    began = time.monotonic()
    print(stack.do("backup", str(tmp_path / "backup")))
    saved_s = time.monotonic() - began
    with pytest.raises(RuntimeError, match="holds data already"):  # nothing is overwritten
        stack.do("restore", str(tmp_path / "backup"))
    stack.do("wipe")
    assert not stack.state.exists()
    began = time.monotonic()
    stack.do("restore", str(tmp_path / "backup"))
    print(f"backup {saved_s:.0f} s, from nothing and the backup to up again {time.monotonic() - began:.0f} s")
    stack.learn()
    assert stack.champion() == champion
    assert [(v.version, v.digest, v.aliases) for v in stack.registry.versions(MODEL)] == versions
    stack.wait_served(champion[1], PICTURES[0])
    assert [stack.served(picture) for picture in PICTURES] == digests


def test_down_leaves_nothing(stack: Stack) -> None:
    keeps(stack)
    stack.do("down")
    mark = str(stack.state)
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYSCALE_STACK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.cmdline())
        except (psutil.Error, OSError):
            continue
    assert left == []
    lines = subprocess.run([sys.executable, "infra/local/stack", "--state", mark, "status"], cwd=ROOT,
                           capture_output=True, text=True)  # fmt: skip
    assert lines.returncode == 1
    assert lines.stdout.count("does not run") == 11
