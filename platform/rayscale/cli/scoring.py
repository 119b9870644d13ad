"""How `publish` and `promote` score an artifact: alike, on the artifact itself, in bounded memory. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rayscale import artifact, contract
from rayscale.artifact import Device, Session
from rayscale.contract import Scores
from rayscale.errors import ConfigError
from rayscale.evaluate import METRICS, Suite, score_model, session_model
from rayscale.storage import open_store

TILE_PX = 512  # low-resolution side; tiled equals whole, and a large photo does not need all the memory
HEADLINE = 2  # metrics of every result and version; the files of scores hold all


class Scored(NamedTuple):
    """A loaded artifact with its scores."""

    session: Session
    scores: Scores


def device_of(option: str) -> Device:
    """What `--device` says. Raises: ConfigError."""
    devices: dict[str, Device] = {"cpu": "cpu", "cuda": "cuda", "auto": "auto"}
    if option not in devices:
        raise ConfigError("--device", option, "must be cpu, cuda or auto", "cpu gives the same figures everywhere")
    return devices[option]


def score_artifact(folder: Path, digest: str, suite: Suite, device: Device) -> Scored:
    """Load (verified, golden probe passed) and score.

    Raises: IntegrityError; ConfigError for a model that the suite cannot judge.
    """
    session = artifact.load(folder, expect_digest=digest, device=device)
    return Scored(session, score_session(session, suite))


def score_session(session: Session, suite: Suite) -> Scores:
    """Raises: ConfigError for a model that the suite cannot judge."""
    return score_model(session_model(session), suite, session.digest, session.provider, TILE_PX)


def means(scores: Scores, prefix: str = "") -> dict[str, float]:
    """The headline figures."""
    names = [metric for metric in METRICS if metric in scores.metrics]
    return {f"{prefix}{metric}": scores.mean(metric) for metric in names[:HEADLINE]}


def suites_of(files: Sequence[str]) -> dict[str, Suite]:
    """The suites of `--suite`, by the names of their files. Raises: ConfigError, MissingError."""
    found = {file_name(Path(file).stem): contract.loads(Suite, read(file), file) for file in files}
    if len(found) < len(files):
        raise ConfigError("--suite", ", ".join(files), "two of one name", "rename one: reports go by file names")
    return found


def read(file: str) -> bytes:
    """A small file, by path or `s3://`. Raises: MissingError."""
    folder, slash, name = file.rpartition("/")
    return open_store(folder or slash or ".").read(name)


def file_name(label: str) -> str:
    """`label` as part of a path."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "-", label)
