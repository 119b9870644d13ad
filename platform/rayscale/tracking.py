"""MLflow runs: what a training, a publication or a promotion leaves behind. Rank 0 only.

The embedded default needs no server: SQLite and local artifacts under `storage.home()`. `MLFLOW_TRACKING_URI`
names another one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

# Read by MLflow while it is imported: no usage reports to third parties, no logging set-up of its own.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# MLflow's own defaults (7 retries, 120 s each) hold a process for minutes when the server is gone.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from rayscale import imaging
from rayscale.contract import to_json
from rayscale.errors import ConfigError, MissingError, RayscaleError, ResourceError, UnavailableError
from rayscale.observe import log
from rayscale.storage import home

PROBE_TIMEOUT_S = 4.0
FLUSH_INTERVAL_S = 5.0
BATCH = 1000  # metrics a request: MLflow's limit
PARAMS_BATCH = 100  # likewise
VALUE_CHARS = 6000  # of a parameter: likewise
MAX_METRICS = 200_000  # kept while the server is away; the oldest go first
MAX_FILES = 32  # likewise, of pictures and texts
RETRY_FIRST_S, RETRY_MOST_S = 15.0, 300.0
FINISH_PATIENCE_S = 60.0
_METRIC_NAME = re.compile(r"^[\w\-. :/]{1,250}$")
_CAUSE = re.compile(r"\[Errno[^\]]*\][^'\")]*|timed out|certificate verify failed[^'\")]*")
_KNOWN_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "ENDPOINT_NOT_FOUND")
_ABSENT = re.compile(r"\b404\b|NoSuchKey|NoSuchBucket")  # stores behind MLflow say it in prose
_MASK = "***@"


def _userinfo(end: str) -> re.Pattern[str]:
    """What stands before the host of a URI, up to its @. end: characters that no URI goes on behind.

    Not by `urlsplit`: to that a password with a slash is a path. Only where the first colon is not that of
    a host and its port (five digits at most) are slashes taken for a password's.
    """
    host = rf"(?:\[[^]{end}]*\]|[^:/?#{end}]*)(?::\d{{1,5}})?(?:[/?#{end}]|$)"
    return re.compile(rf"(?<=://)(?:[^/?#{end}]*@|(?!{host})[^/?#{end}]*:[^{end}]*@)")


_IN_URI, _IN_TEXT = _userinfo(r"\0"), _userinfo(r"\s")  # a password may hold a space, in prose a URI ends there
_REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")

for _chatter, _level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
    logging.getLogger(_chatter).setLevel(_level)


def default_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the embedded SQLite database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """`https://user:secret@host/x` -> `https://host/x`: what may be stored and shown. A user may be a token."""
    return _IN_URI.sub("", uri)


def connect(uri: str | None = None) -> MlflowClient:
    """A client of a tracking server or database that answers; an embedded database is made here.

    Raises: UnavailableError within some seconds where a server does not answer; ConfigError for a bad URI.
    """
    uri = uri or default_uri()
    if not uri.startswith(("http://", "https://", "sqlite:///")):
        raise ConfigError("MLFLOW_TRACKING_URI", _IN_URI.sub(_MASK, uri), "must be http(s)://HOST or sqlite:///FILE",
                          "put `mlflow server` in front of any other database")  # fmt: skip
    if database := _sqlite_path(uri):
        try:
            database.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("MLFLOW_TRACKING_URI", uri, str(error), "choose a folder that can be written") from None
    with answering(uri):
        if database is not None and not database.exists():
            _make_database(database)
        if database is None:
            # Any answer will do; the session's own retries and time limit are for a server that was seen alive.
            http_request(get_default_host_creds(uri), "/health", "GET", timeout=PROBE_TIMEOUT_S, max_retries=1,
                         backoff_factor=0, backoff_jitter=0, raise_on_status=False)  # fmt: skip
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(database: Path) -> None:
    """MLflow's tables, made aside and linked into place: its migrations survive neither a kill nor a second maker."""
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=database.parent) as scratch:
        made = Path(scratch) / database.name
        MlflowClient(f"sqlite:///{made}", f"sqlite:///{made}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):
            os.link(made, database)


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """MLflow's errors as ours, one line each: absent, refused, or not answering."""
    try:
        yield
    except MlflowException as error:
        _raise(uri, error.error_code, error)
    except OSError as error:  # requests' and boto3's connection errors, a full disk, a folder without rights
        _raise(uri, "", error)
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("sqlalchemy", "botocore", "boto3", "urllib3"):
            _raise(uri, "", error)
        raise


def _raise(uri: str, code: str, error: Exception) -> NoReturn:
    said = _masked(" ".join(str(error).split()))
    if cause := _CAUSE.search(said):  # of a chain of four libraries, what the system said
        said = cause[0]
    uri = _IN_URI.sub(_MASK, uri)
    if code in _KNOWN_ABSENT:
        raise MissingError("tracking", uri, said, "check MLFLOW_TRACKING_URI and the name") from None
    if code in _REFUSED:
        remedy = "set MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN"
        raise ConfigError("MLFLOW_TRACKING_URI", uri, said, remedy) from None
    if code == "INVALID_PARAMETER_VALUE":
        raise ConfigError("MLflow", uri, said, "correct the value") from None
    if "disk is full" in said or getattr(error, "errno", None) in (
        errno.ENOSPC,
        errno.EDQUOT,
    ):  # SQLite says it in prose
        raise ResourceError("disk", uri, said[:160], "free some space and run again") from None
    remedy = "check that MLflow is up, then run this again"
    raise UnavailableError("MLFLOW_TRACKING_URI", uri, said[:160], remedy) from error


def _masked(text: str) -> str:
    return _IN_TEXT.sub(_MASK, text)  # no passwords in messages


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of that name, made where it is missing."""
    uri = str(client.tracking_uri)
    with answering(uri):
        found = client.get_experiment_by_name(name)
        if found is None:
            database = _sqlite_path(uri)  # its artifacts lie beside it; MLflow's default is the working directory
            location = (database.parent / "mlartifacts").as_uri() if database else None
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)  # another process was faster
    if found is None or found.lifecycle_stage != "active":
        raise ConfigError("experiment", name, "was deleted in MLflow", "restore it there or choose another name")
    return str(found.experiment_id)


class Tracker:
    """One MLflow run, open for writing. Make it with `Tracker.start`.

    Metrics, pictures, texts and tags are buffered; a server that goes away costs a warning, not the run.
    Parameters, the dataset and folders are sent at once and raise.
    """

    def __init__(self, client: MlflowClient, run_id: str, logged: Mapping[str, int], known: frozenset[str]) -> None:
        self.client, self.run_id, self.uri = client, run_id, str(client.tracking_uri)
        self._logged, self._known_params = dict(logged), known  # metric -> last step that a resumed run holds
        self._metrics: deque[Metric] = deque(maxlen=MAX_METRICS)
        self._files: deque[tuple[str, bytes]] = deque(maxlen=MAX_FILES)
        self._tags: dict[str, str] = {}
        self._dropped = 0
        self._flushed = time.monotonic()
        self._failures, self._retry_at = 0, 0.0
        self._monitors: list[Any] = []

    @classmethod
    def start(
        cls,
        experiment: str,
        run_name: str,
        *,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        uri: str | None = None,
    ) -> Tracker:
        """A new run, or `run_id` again: what it holds already is not logged twice.

        Raises: UnavailableError, MissingError (no such run), ConfigError.
        """
        client = connect(uri)
        uri = str(client.tracking_uri)
        texts = {key: str(value) for key, value in (tags or {}).items()}
        with answering(uri):
            if run_id is None:
                run = client.create_run(experiment_id(client, experiment), run_name=run_name, tags=texts)
                run_id = str(run.info.run_id)
            else:
                run = client.get_run(run_id)
                if run.info.lifecycle_stage != "active":
                    raise MissingError("run", run_id, "was deleted in MLflow", "restore it there or start a new run")
                client.update_run(run_id, status="RUNNING")
                if texts:
                    client.log_batch(run_id, tags=[RunTag(k, v) for k, v in texts.items()])
        # The newest value of every metric carries its step: one question instead of a history each.
        logged = {str(m.key): int(m.step) for m in run.to_proto().data.metrics}
        return cls(client, run_id, logged, frozenset(run.data.params))

    def params(self, mapping: Any) -> None:
        """Log parameters, flattened to dotted names, long values cut. A resumed run keeps those it has."""
        flat = {name: value[:VALUE_CHARS] for name, value in flatten(mapping).items()}
        new = [Param(name, value) for name, value in flat.items() if name not in self._known_params]
        with answering(self.uri):
            for i in range(0, len(new), PARAMS_BATCH):
                self.client.log_batch(self.run_id, params=new[i : i + PARAMS_BATCH])
        self._known_params |= flat.keys()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Buffer one value each at `step`. A replayed step of a resumed run is dropped, per metric."""
        now_ms = int(time.time() * 1000)
        for name, value in values.items():
            if not _METRIC_NAME.match(name):
                raise ConfigError("metric", name, "letters, digits and _-. :/ only, up to 250", "rename it")
            if step > self._logged.get(name, -1):
                self._dropped += len(self._metrics) == MAX_METRICS
                self._metrics.append(Metric(name, float(value), now_ms, step))
        if len(self._metrics) >= BATCH or time.monotonic() - self._flushed >= FLUSH_INTERVAL_S:
            self.flush()

    def system(self, step: int) -> None:
        """Buffer what this node is busy with: CPU (since the last call), memory, disk, network, NVIDIA GPUs.

        Under the names by which MLflow shows them. Its own monitor is a thread that ends when a server is away for
        a moment, and that counts in samples of its own.
        """
        if not self._monitors:
            self._monitors = _monitors()
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self.metrics({f"system/{name}": value for name, value in found.items()}, step)

    def picture(self, hwc_u8: imaging.U8, path: str) -> None:
        """A PNG artifact, e.g. at "samples/000.png"."""
        self._file(path, imaging.encode(hwc_u8, "png"))

    def text(self, text: str, path: str) -> None:
        """A text artifact, e.g. at "recipe.json"."""
        self._file(path, text.encode())

    def _file(self, path: str, data: bytes) -> None:
        self._dropped += len(self._files) == MAX_FILES
        self._files.append((path, data))
        self.flush()

    def tags(self, mapping: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._tags |= {key: str(value) for key, value in mapping.items()}
        self.flush()

    def folder(self, path: Path, artifact_path: str) -> str:
        """Upload a folder; returns its artifact URI."""
        with answering(self.uri):
            self.client.log_artifacts(self.run_id, str(path), artifact_path)
            return artifact_uri(self.client, self.run_id, artifact_path)

    def dataset(self, name: str, uri: str, digest: str) -> None:
        """Name the data that this run reads; MLflow keeps 36 characters of the digest, a tag all of them."""
        kind = "s3" if uri.startswith("s3://") else "local"
        source = Dataset(name=name, digest=digest[:36], source_type=kind, source=json.dumps({"uri": uri}))
        with answering(self.uri):
            self.client.log_inputs(self.run_id, [DatasetInput(source)])
            self.client.set_tag(self.run_id, f"dataset.{name}.digest", digest)

    def flush(self) -> bool:
        """Send what is buffered; False where the server is away (said once, tried again later)."""
        self._flushed = time.monotonic()
        if self._flushed < self._retry_at:
            return False
        try:
            self._send()
        except RayscaleError as error:
            if not self._failures:
                log.warning("tracking is away, the run goes on and its records are kept: %s", error)
            self._retry_at = time.monotonic() + min(RETRY_FIRST_S * 2**self._failures, RETRY_MOST_S)
            self._failures += 1
            return False
        if self._failures:
            log.warning("tracking is back, %d records were lost", self._dropped)
        self._failures, self._retry_at = 0, 0.0
        return True

    def _send(self) -> None:
        if self._failures:
            connect(self.uri)  # seconds, where a request to a dead server takes minutes
        with answering(self.uri):
            while self._metrics or self._tags:
                batch = list(islice(self._metrics, BATCH - PARAMS_BATCH))
                tags = [RunTag(key, value) for key, value in self._tags.items()]
                # Sent twice (an answer was lost), an equal metric is kept once.
                self.client.log_batch(self.run_id, metrics=batch, tags=tags[:PARAMS_BATCH])
                for _ in batch:
                    self._metrics.popleft()
                for tag in tags[:PARAMS_BATCH]:
                    del self._tags[tag.key]
            while self._files:
                path, data = self._files[0]
                _log_bytes(self.client, self.run_id, data, path)
                self._files.popleft()

    def finish(self, status: str = "FINISHED") -> None:
        """Send the rest and close the run (FINISHED, FAILED, KILLED). A server that is away raises nothing."""
        deadline = time.monotonic() + (FINISH_PATIENCE_S if status == "FINISHED" else 0.0)
        while True:
            self._retry_at = 0.0
            sent = self.flush()
            if sent or time.monotonic() >= deadline:
                break
            time.sleep(2.0)
        if not sent:
            log.error("tracking stayed away: %d metrics and %d files of run %s are lost, it stays open there",
                      len(self._metrics), len(self._files), self.run_id)  # fmt: skip
            return
        try:
            with answering(self.uri):
                self.client.set_terminated(self.run_id, status=status)
        except RayscaleError as error:
            log.error("run %s stays open in tracking: %s", self.run_id, error)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # no NVIDIA driver here, or none that answers
        found.append(GPUMonitor())
    return found


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings and dataclasses as {dotted name: text}; lists as JSON."""
    value = to_json(value)
    if not isinstance(value, dict):
        return {prefix: value if isinstance(value, str) else json.dumps(value)}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def artifact_uri(client: MlflowClient, run_id: str, artifact_path: str) -> str:
    """Where an artifact of a run lies, in the artifact store's own terms."""
    return f"{str(client.get_run(run_id).info.artifact_uri).rstrip('/')}/{artifact_path}"


def download(tracking_uri: str, uri: str, folder: Path) -> Path:
    """A local copy, in `folder`, of what lies at an artifact URI. Raises: MissingError, UnavailableError."""
    folder.mkdir(parents=True)
    with answering(tracking_uri):
        try:
            return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=tracking_uri))
        except (MlflowException, OSError) as error:
            if not isinstance(error, FileNotFoundError) and not _ABSENT.search(str(error)):
                raise
            raise MissingError("artifact", uri, "is not there", "restore the artifact store") from None


def remove(tracking_uri: str, uri: str) -> None:
    """Delete what lies at an artifact URI. Raises: UnavailableError."""
    with answering(tracking_uri):
        get_artifact_repository(uri, tracking_uri=tracking_uri).delete_artifacts()


def error_code(error: Exception) -> str:
    """MLflow's code for an error, "" for anybody else's."""
    return str(error.error_code) if isinstance(error, MlflowException) else ""


def _log_bytes(client: MlflowClient, run_id: str, data: bytes, path: str) -> None:
    where = PurePosixPath(path)
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / where.name
        local.write_bytes(data)
        client.log_artifact(run_id, str(local), None if len(where.parts) == 1 else str(where.parent))
