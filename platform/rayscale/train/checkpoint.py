"""The state of a run <-> a directory with checksums.

    RUN/checkpoint_*/    nets.safetensors, optimizers.safetensors, checkpoint.json (written last)

A folder without a `checkpoint.json` whose checksums hold is not a checkpoint, and the one before it is taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rayscale import contract
from rayscale.errors import ConfigError, IntegrityError, MissingError
from rayscale.nn import unwrap
from rayscale.observe import log
from rayscale.storage import download_dir, join, open_store
from rayscale.task import Task

_DAMAGED = (IntegrityError, ConfigError, MissingError)  # an outage is none of them: it is not taken for damage
_FOLDER = re.compile(r"^(checkpoint_[^/]+)/checkpoint\.json$")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """`checkpoint.json`: where a run stood, and the checksums of the files beside."""

    images_seen: int
    position: int  # global steps of the plan that were consumed
    plan_digest: str
    recipe_digest: str
    code_version: str
    chain: str  # hash chain over the global batches consumed so far (hex)
    metrics: Mapping[str, float]  # of the validation at this point; empty where none ran
    files: Mapping[str, str]  # file -> SHA-256
    uri: str = ""  # where it was read from
    schema: int = contract.SCHEMA


def save(
    folder: Path,
    nets: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    info: CheckpointInfo,
) -> None:
    """Write a checkpoint into an empty local folder; `checkpoint.json` last."""
    tensors = {f"{k}/{name}": t for k, net in nets.items() for name, t in unwrap(net).state_dict().items()}
    state: dict[str, Tensor] = {}
    for turn, optimizer in optimizers.items():
        for index, slots in optimizer.state_dict()["state"].items():
            state |= {f"{turn}/{index}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
    files = {}
    for name, content in (("nets.safetensors", tensors), ("optimizers.safetensors", state)):
        # safetensors refuses shared memory: an EMA that aliases its source would be a bug worth hearing of
        save_file({k: t.detach().cpu().contiguous() for k, t in content.items()}, folder / name)
        files[name] = _sha256(folder / name)
    info = dataclasses.replace(info, files=files)
    (folder / "checkpoint.json").write_text(contract.dumps(info))


def checkpoints(run_uri: str) -> list[CheckpointInfo]:
    """All published checkpoints of a run, newest first, unverified: `fetch` verifies."""
    store = open_store(run_uri)
    found = []
    for entry in store.list("checkpoint_"):
        if match := _FOLDER.match(entry.key):
            uri = join(run_uri, match[1])
            try:
                info = contract.loads(CheckpointInfo, store.read(entry.key), uri)
            except _DAMAGED as error:
                log.warning("skipping a damaged checkpoint: %s", error)
                continue
            found.append(dataclasses.replace(info, uri=uri))
    return sorted(found, key=lambda c: (c.images_seen, c.uri), reverse=True)


def newest(run_uri: str, folder: Path) -> CheckpointInfo | None:
    """The newest checkpoint that verifies, fetched into `folder`; None where the run has none yet.

    Raises: IntegrityError where there are some and none verifies: a run is not begun anew behind one's back.
    """
    found = checkpoints(run_uri)
    for info in found:
        try:
            fetch(info, folder)
            return info
        except _DAMAGED as error:
            log.warning("skipping a damaged checkpoint: %s", error)
    if found:
        raise IntegrityError(
            run_uri, f"{len(found)} checkpoints", "none of them verifies", "train --new, or restore one"
        )
    return None


def select(
    run_uri: str,
    which: Literal["best", "last"],
    metric: str = "psnr_y",
    *,
    recipe_digest: str = "",
    plan_digest: str = "",
) -> CheckpointInfo:
    """The checkpoint that ships: the newest, or the one with the highest validated `metric`.

    With digests given, only checkpoints of that recipe and plan count: before a --rebase, scores meant other things.

    Raises: MissingError where there is none, or none was scored by `metric`.
    """
    there = checkpoints(run_uri)
    found = [c for c in there if recipe_digest in ("", c.recipe_digest) and plan_digest in ("", c.plan_digest)]
    if not found and there:
        rule = f"the run has none since its recipe or data were edited, at {there[0].images_seen} images"
        remedy = "wait for the next one, or `train --rebase` with run.total_images above that"
        raise MissingError("checkpoint", run_uri, rule, remedy)
    if not found:
        raise MissingError("checkpoint", run_uri, "the run has none", "train first, or wait for the first one")
    if which == "last":
        return found[0]
    scored = [c for c in found if math.isfinite(c.metrics.get(metric, math.nan))]
    if not scored:
        known = sorted({name for c in found for name in c.metrics})
        raise MissingError("run.best_metric", metric, f"the checkpoints have scores by {known}", "take --which last")
    return max(scored, key=lambda c: c.metrics[metric])


def fetch(info: CheckpointInfo, folder: Path) -> None:
    """Download and verify. Raises: IntegrityError where a file is not what its checksum says."""
    folder.mkdir(parents=True, exist_ok=True)
    download_dir(info.uri, folder)
    for name, expected in info.files.items():
        path = folder / name
        if not path.exists() or _sha256(path) != expected:
            raise IntegrityError(
                f"{info.uri}/{name}", expected[:12], "does not have this checksum", "the checkpoint before it is taken"
            )


def restore(folder: Path, nets: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Load a fetched checkpoint into freshly built nets and optimizers."""
    _restore_nets(load_file(folder / "nets.safetensors"), nets)
    state = load_file(folder / "optimizers.safetensors")
    for turn, optimizer in optimizers.items():
        slots: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for key, tensor in state.items():
            name, index, slot = key.split("/")
            if name == turn:
                p = parameters[int(index)]
                like = torch.empty_like(p) if tensor.shape == p.shape else torch.empty_like(tensor)
                slots.setdefault(int(index), {})[slot] = like.copy_(tensor)  # keeps the memory format
        # hyperparameters are the recipe's, which --rebase may have edited; only the state is the checkpoint's
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def load_nets(info: CheckpointInfo, task: Task) -> dict[str, nn.Module]:
    """The nets of a checkpoint on the CPU, in eval mode: what publishing starts from."""
    nets = task.build(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        fetch(info, Path(scratch))
        _restore_nets(load_file(Path(scratch) / "nets.safetensors"), nets)
    return {name: net.eval() for name, net in nets.items()}


def warm_start(run_uri: str, nets: Mapping[str, nn.Module]) -> list[str]:
    """Load the newest weights of another run into the nets that it has too, by name; the others stay as they are.

    Returns the names of the nets loaded. Raises: MissingError (no checkpoint), ConfigError (no net in common),
    IntegrityError (one of another shape).
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = newest(run_uri, Path(scratch) / "checkpoint")
        if found is None:
            raise MissingError(
                "run.warm_start", run_uri, "holds no checkpoint", "give the run_uri that `train` printed"
            )
        tensors = load_file(Path(scratch) / "checkpoint" / "nets.safetensors")
    theirs = {name.partition("/")[0] for name in tensors}
    common = {name: net for name, net in nets.items() if name in theirs}
    if not common:
        rule = f"its nets are {', '.join(sorted(theirs))}, those of this recipe {', '.join(sorted(nets))}"
        raise ConfigError("run.warm_start", run_uri, rule, "give a run of the same family, or of an SRGAN's generator")
    _restore_nets(tensors, common)
    return sorted(common)


def _restore_nets(tensors: Mapping[str, Tensor], nets: Mapping[str, nn.Module]) -> None:
    for name, net in nets.items():
        prefix = f"{name}/"
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        try:
            unwrap(net).load_state_dict(own)
        except RuntimeError as error:
            raise IntegrityError(
                f"net {name}",
                " ".join(str(error).split())[:160],
                "does not fit this recipe",
                "use the recipe that made the checkpoint, or start with --new",
            ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
