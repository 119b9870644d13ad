"""How `publish` and `promote` score an artifact: alike, on the artifact itself, in bounded memory. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rayscale import artifact, evaluate
from rayscale.artifact import Device, Session
from rayscale.contract import Scores
from rayscale.errors import ConfigError
from rayscale.evaluate import Suite

TILE_PX = 512  # low-resolution side; tiled equals whole, and a large photo does not need all the memory
BASELINE = "bicubic"
METRICS = ("psnr_y", "ssim_y")  # of every result and version; the files of scores hold all


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

    Raises: IntegrityError; ConfigError for a model that is no image -> image function of the suite's scale.
    """
    session = artifact.load(folder, expect_digest=digest, device=device)
    spec = session.card.spec
    if (spec.kind, len(spec.inputs), spec.scale) != ("transform", 1, suite.scale):
        rule = f"only an x{suite.scale} image -> image model can be scored on this suite"
        raise ConfigError("model", f"{spec.kind} x{spec.scale}", rule, "give it a suite of its own")
    run = evaluate.session_run(session, None if spec.halo_px is None else TILE_PX)
    return Scored(session, evaluate.score(run, suite, digest, session.provider))


def score_baseline(suite: Suite) -> Scores:
    """What every model must beat."""
    return evaluate.score(evaluate.baseline(suite.scale), suite, BASELINE)


def means(scores: Scores, prefix: str = "") -> dict[str, float]:
    """The headline figures."""
    return {f"{prefix}{metric}": scores.mean(metric) for metric in METRICS}
