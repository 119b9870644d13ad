"""What a run leaves in a real MLflow, on SQLite and behind a real server, also when the server goes away."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from rayscale import tracking
from rayscale.errors import ConfigError, MissingError, UnavailableError
from rayscale.tracking import Tracker, connect, default_uri


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, name)]


def artifact_bytes(tracker: Tracker, path: str, to: Path) -> bytes:
    to.mkdir(exist_ok=True)
    return Path(download_artifacts(run_id=tracker.run_id, artifact_path=path, dst_path=str(to),
                                   tracking_uri=tracker.uri)).read_bytes()  # fmt: skip


@dataclass(frozen=True)
class Inner:
    sides: tuple[int, ...] = (1, 2)
    note: str = "x" * 9000


def test_a_run_holds_what_was_logged(mlflow_home: Path, tmp_path: Path) -> None:
    tracker = Tracker.start("upscaling", "first", tags={"who": "test"})
    assert tracker.uri == default_uri() == f"sqlite:///{mlflow_home}/mlflow.db"
    tracker.params({"task": Inner(), "seed": 3, "nothing": None})
    for step in range(2500):  # more than MLflow takes in one request
        tracker.metrics({"progress/images_seen": step, "loss/l1": 1.0 / (step + 1)}, step)
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    tracker.picture(picture, "samples/000.png")
    tracker.text('{"a": 1}', "recipe.json")
    tracker.dataset("train", "s3://bucket/photos", "d" * 64)
    tracker.dataset("train", "s3://bucket/photos", "d" * 64)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_bytes(b"abc")
    uri = tracker.folder(tmp_path / "folder", "artifact")
    tracker.tags({"late": "yes"})
    tracker.finish()

    run = tracker.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["task.sides"] == "[1, 2]"
    assert run.data.params["seed"] == "3"
    assert run.data.params["nothing"] == "null"
    assert run.data.params["task.note"] == "x" * 6000
    assert {"who": "test", "late": "yes", "dataset.train.digest": "d" * 64}.items() <= run.data.tags.items()
    assert history(tracker.client, tracker.run_id, "loss/l1") == [(s, 1.0 / (s + 1)) for s in range(2500)]
    decoded = cv2.imdecode(np.frombuffer(artifact_bytes(tracker, "samples/000.png", tmp_path / "d"), np.uint8), 1)
    assert np.array_equal(decoded[..., ::-1], picture)
    assert json.loads(artifact_bytes(tracker, "recipe.json", tmp_path / "d")) == {"a": 1}
    assert uri.endswith("/artifact")
    assert (mlflow_home / "mlartifacts" / tracker.run_id / "artifacts" / "artifact" / "x.bin").read_bytes() == b"abc"
    [given] = run.inputs.dataset_inputs
    assert json.loads(given.dataset.source) == {"uri": "s3://bucket/photos"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "folder", "home"]  # MLflow's ./mlruns is not among them


def test_a_run_shows_what_its_node_is_busy_with(mlflow_home: Path) -> None:
    tracker = Tracker.start("busy", "run")
    tracker.system(100)
    tracker.system(200)
    tracker.finish()
    for name in ("cpu_utilization_percentage", "system_memory_usage_percentage", "network_receive_megabytes"):
        found = history(tracker.client, tracker.run_id, f"system/{name}")
        assert [step for step, _ in found] == [100, 200]
        assert all(value >= 0 for _, value in found)


def test_a_resumed_run_logs_no_step_twice_and_loses_none(mlflow_home: Path) -> None:
    first = Tracker.start("e", "r")
    first.params({"seed": 1})
    for seen in (100, 200, 300):
        first.metrics({"progress/images_seen": seen, "loss": seen / 2}, seen)
    first.metrics({"psnr_y": 30.0}, 200)
    first.flush()  # and the process dies here, after a checkpoint at 100

    again = Tracker.start("other name is of no account", "r", run_id=first.run_id)
    again.params({"seed": 2, "new": 5})
    for seen in (200, 300, 400):
        again.metrics({"progress/images_seen": seen, "loss": -1.0}, seen)
    again.metrics({"psnr_y": 31.0}, 300)  # validation at 300 had not run: it is no repetition
    again.finish()

    assert again.run_id == first.run_id
    assert history(again.client, first.run_id, "loss") == [(100, 50.0), (200, 100.0), (300, 150.0), (400, -1.0)]
    assert [s for s, _ in history(again.client, first.run_id, "progress/images_seen")] == [100, 200, 300, 400]
    assert history(again.client, first.run_id, "psnr_y") == [(200, 30.0), (300, 31.0)]
    run = again.client.get_run(first.run_id)
    assert run.data.params == {"seed": "1", "new": "5"}
    assert run.info.status == "FINISHED"


def test_metrics_are_buffered(mlflow_home: Path) -> None:
    tracker = Tracker.start("e", "r")
    tracker.metrics({"loss": 1.0}, 1)
    assert history(tracker.client, tracker.run_id, "loss") == []
    tracker.finish("FAILED")
    assert history(tracker.client, tracker.run_id, "loss") == [(1, 1.0)]
    assert tracker.client.get_run(tracker.run_id).info.status == "FAILED"


def test_mistakes_are_named(mlflow_home: Path, tmp_path: Path) -> None:
    tracker = Tracker.start("e", "r")
    with pytest.raises(ConfigError, match="loss!"):
        tracker.metrics({"loss!": 1.0}, 1)
    with pytest.raises(MissingError, match="0123"):
        Tracker.start("e", "r", run_id="0123")
    tracker.client.delete_experiment(tracker.client.get_experiment_by_name("e").experiment_id)
    with pytest.raises(ConfigError, match="experiment=e: was deleted"):
        Tracker.start("e", "r")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose a folder"):
        connect(f"sqlite:///{tmp_path}/file/x/mlflow.db")
    with pytest.raises(ConfigError) as caught:
        connect("postgresql://me:secret@db/mlflow")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:p@ss@host", "https://host"),
        ("https://user:a/b@host/x", "https://host/x"),
        ("https://user:/b@host:5000", "https://host:5000"),
        ("https://user:a/b@c?d#e@host/x", "https://host/x"),
        ("https://user:123456/b@host", "https://host"),
        ("https://TOKEN@host", "https://host"),
        ("https://:pw@host", "https://host"),
        ("https://user:pw@[::1]:5000/a@b", "https://[::1]:5000/a@b"),
        ("postgresql+psycopg2://user:pw@host:5432/db", "postgresql+psycopg2://host:5432/db"),
    ],
)
def test_nothing_that_stands_before_the_host_is_shown(uri: str, shown: str) -> None:
    scheme, _, rest = shown.partition("://")
    assert tracking.without_password(uri) == shown
    assert tracking._masked(f"no answer from {uri} for me@home: 1/2") == (
        f"no answer from {scheme}://***@{rest} for me@home: 1/2"
    )
    with pytest.raises(UnavailableError) as caught, tracking.answering(uri):
        raise ConnectionError(f"{uri} is away")
    assert str(caught.value).count(f"{scheme}://***@{rest}") == 2
    assert uri not in str(caught.value)


def test_a_password_with_a_space_is_not_shown() -> None:
    assert tracking.without_password("https://user:p w@host/x") == "https://host/x"
    with pytest.raises(ConfigError, match=r"=postgresql://\*\*\*@db/mlflow:"):
        connect("postgresql://me:sec ret@db/mlflow")


@pytest.mark.parametrize(
    "uri",
    [
        "https://host/a@b",
        "https://host:5000/a@b",
        "https://host:5000/a:b@c",
        "https://host?to=a@b",
        "https://host#a@b",
        "http://[::1]:5000/a@b",
        "http://[::1]/a@b",
        "s3://bucket/a@b",
        "sqlite:////home/a@b/mlflow.db",
        "sqlite:///a@b.db",
        "file:///x/a:b@c",
        "/home/me:x//a@b",
        "me@home",
        "",
    ],
)
def test_what_holds_no_password_stays_as_it_is(uri: str) -> None:
    assert tracking.without_password(uri) == uri
    assert tracking._masked(f"a@b: {uri}, c@d") == f"a@b: {uri}, c@d"


def test_nothing_is_said_on_the_way(mlflow_home: Path) -> None:
    """The last line of standard output is a command's result; MLflow must not write there, nor chat elsewhere."""
    (mlflow_home / "mlflow.db").unlink()  # making the schema is when it is loudest
    code = "from rayscale.tracking import Tracker; t = Tracker.start('e', 'r'); t.metrics({'a': 1}, 1); t.finish()"
    path = str(Path(tracking.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")


@contextmanager
def black_hole() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_does_not_answer_is_one_line_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PROBE_TIMEOUT_S", 0.5)
    with black_hole() as uri:
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="timed out") as caught:
            connect(uri)
    assert time.monotonic() - started < 4 * 0.5 + 1
    with pytest.raises(UnavailableError, match="Connection refused") as refused:
        connect(uri)
    for error in (caught, refused):
        assert "\n" not in str(error.value)
        assert uri in str(error.value)


class Server:
    """A real MLflow server over a copy of the template, that can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        where = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination",
                 str(self.folder / "served")]  # fmt: skip
        command = [sys.executable, "-m", "mlflow", "server", *where, "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("a") as out:
            self.process = subprocess.Popen(
                [*command, "--workers", "1"], stdout=out, stderr=out, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.long
def test_a_server_that_goes_away_costs_no_run_and_no_record(
    mlflow_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "FINISH_PATIENCE_S", 0.0)
    monkeypatch.setattr(logging.getLogger("rayscale"), "propagate", True)
    server = Server(mlflow_home)
    server.start()
    try:
        tracker = Tracker.start("e", "r", uri=server.uri)
        lost = Tracker.start("e", "never back", uri=server.uri)
        tracker.metrics({"loss": 1.0}, 1)
        assert tracker.flush()
        server.kill()
        for step in range(2, 5):
            tracker.metrics({"loss": float(step)}, step)
            assert not tracker.flush()
        tracker.text("kept", "note.txt")
        said = dict.fromkeys(caplog.records)  # pytest may listen at the logger and at the root
        assert [r.levelname for r in said] == ["WARNING"]
        lost.metrics({"loss": 1.0}, 1)
        lost.finish()  # said, not raised
        assert caplog.records[-1].levelname == "ERROR"
        assert "1 metrics" in caplog.text
        server.start()
        tracker.finish()
        client = connect(server.uri)
        assert history(client, tracker.run_id, "loss") == [(s, float(s)) for s in range(1, 5)]
        assert artifact_bytes(tracker, "note.txt", mlflow_home / "d") == b"kept"
        assert client.get_run(tracker.run_id).info.status == "FINISHED"
        assert history(client, lost.run_id, "loss") == []  # the control: without a retry they are gone
    finally:
        server.kill()


def test_a_database_whose_making_was_killed_is_made_again(tmp_path: Path) -> None:
    """MLflow's migrations do not survive a kill: what they have begun must not lie where the database belongs."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = "import sys; from rayscale.tracking import connect; connect(sys.argv[1])"
    maker = subprocess.Popen([sys.executable, "-c", code, uri])
    while not any(found.stat().st_size > 100_000 for found in tmp_path.rglob("mlflow.db")):
        assert maker.poll() is None
        time.sleep(0.005)
    maker.kill()
    maker.wait()
    assert not (tmp_path / "mlflow.db").exists()
    connect(uri).search_experiments()
