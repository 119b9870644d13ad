"""The loop, without Ray: it learns, resumes to the bit, accumulates rightly, and stops at what is not finite."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rayscale.contract import Spec
from rayscale.data.sample import MicroBatch
from rayscale.errors import DivergedError, IntegrityError
from rayscale.nn import unwrap
from rayscale.task import Batch, Losses, Optimizer, Turn
from rayscale.tasks.compact import Compact
from rayscale.train import checkpoint, loop
from rayscale.train.checkpoint import CheckpointInfo
from rayscale.train.loop import RunSettings, State, build_state, fit, learning_rate

CPU = torch.device("cpu")
TASK = Compact(scale=2, features=8, blocks=1, optimizer=Optimizer(learning_rate=3e-3), clip_norm=None)
SHARDS, MICRO = 4, 2
RUN = RunSettings(total_images=256, log_every_images=64, validate_every_images=128, checkpoint_every_images=64)


def micro_batch(step: int, shard: int, size: int = MICRO) -> MicroBatch:
    rng = np.random.default_rng([step, shard])
    coarse = rng.integers(0, 256, (size, 4, 4, 3))
    hr = np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.uint8)
    hr[:, ::2] //= 2
    lr = hr.reshape(size, 8, 2, 8, 2, 3).mean((2, 4)).astype(np.uint8)
    batch = MicroBatch(step, shard, {"lr": lr, "hr": hr}, np.full((size, 3), step), b"")
    return replace(batch, sha256=batch.checksum())


def stream(start: int, shards: int = SHARDS, size: int = MICRO) -> Iterator[list[MicroBatch]]:
    step = start
    while True:
        yield [micro_batch(step, shard, size) for shard in range(shards)]
        step += 1


@dataclass
class Kept:
    """Hooks that keep everything in a folder."""

    folder: Path
    logged: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    validated: list[int] = field(default_factory=list)
    checkpoints: dict[int, Path] = field(default_factory=dict)
    images: int = 0

    def stepped(self, images_seen: int) -> None:
        self.images = images_seen

    def log(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        self.logged.append((images_seen, metrics))

    def validate(self, images_seen: int, nets: Mapping[str, nn.Module]) -> Mapping[str, float]:
        self.validated.append(images_seen)
        return {"psnr_y": float(images_seen)}

    def checkpoint(self, state: State, images_seen: int, metrics: Mapping[str, float]) -> None:
        path = self.checkpoints[images_seen] = self.folder / f"checkpoint_{images_seen:06d}"
        path.mkdir()
        info = CheckpointInfo(
            images_seen=images_seen, position=state.step, plan_digest="", recipe_digest="", code_version="",
            chain=state.chain, metrics=dict(metrics), files={},
        )  # fmt: skip
        checkpoint.save(path, state.nets, state.optimizers, info)


def run(
    folder: Path, settings: RunSettings = RUN, task: object = TASK, resume: Path | None = None
) -> tuple[State, Kept]:
    folder.mkdir(exist_ok=True)
    state, hooks = build_state(task, settings, CPU), Kept(folder)  # type: ignore[arg-type]
    if resume:
        checkpoint.restore(resume, state.nets, state.optimizers)
        info = next(c for c in checkpoint.checkpoints(str(resume.parent)) if Path(c.uri).name == resume.name)
        state.step, state.chain = info.position, info.chain
    fit(task, settings, state, stream(state.step), global_batch=SHARDS * MICRO, shards=SHARDS, device=CPU, hooks=hooks)  # type: ignore[arg-type]
    return state, hooks


def weights(state: State) -> torch.Tensor:
    return torch.cat([v.flatten() for net in state.nets.values() for v in unwrap(net).state_dict().values()])


def test_it_learns_and_keeps_its_appointments(tmp_path: Path) -> None:
    state, hooks = run(tmp_path / "run")
    losses = [m["loss/l1"] for _, m in hooks.logged]
    assert losses[-1] < 0.8 * losses[0]
    assert [i for i, _ in hooks.logged] == [64, 128, 192, 256]
    assert hooks.validated == [128, 256]
    assert list(hooks.checkpoints) == [64, 128, 192, 256]
    assert (state.step, hooks.images) == (32, 256)
    assert hooks.logged[0][1]["learning_rate/g"] == 3e-3
    assert not torch.equal(*(torch.cat([p.flatten() for p in state.nets[n].parameters()]) for n in ("net", "ema")))


def test_the_step_that_completes_total_images_is_the_last(tmp_path: Path) -> None:
    state, hooks = run(tmp_path / "run", replace(RUN, total_images=130))
    assert (state.step, list(hooks.checkpoints), hooks.validated) == (17, [64, 128, 136], [128, 136])


@pytest.mark.parametrize("at", [64, 128, 192])
def test_a_resumed_run_ends_bitwise_where_the_undisturbed_one_does(tmp_path: Path, at: int) -> None:
    whole, kept = run(tmp_path / "whole")
    resumed, hooks = run(tmp_path / "resumed", resume=kept.checkpoints[at])
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.chain == resumed.chain
    assert [i for i, _ in hooks.logged] == [i for i, _ in kept.logged if i > at]


def test_a_lost_optimizer_state_would_show(tmp_path: Path) -> None:
    """Negative control of the test above."""
    whole, kept = run(tmp_path / "whole")
    state = build_state(TASK, RUN, CPU)
    checkpoint.restore(kept.checkpoints[128], state.nets, {})
    state.step = 16
    fit(TASK, RUN, state, stream(16), global_batch=SHARDS * MICRO, shards=SHARDS, device=CPU, hooks=Kept(tmp_path))
    assert not torch.equal(weights(whole), weights(state))


def test_micro_batches_add_up_to_one_large_batch(tmp_path: Path) -> None:
    def one_step(cut: int) -> torch.Tensor:
        settings = replace(RUN, total_images=8)
        state = build_state(TASK, settings, CPU)
        large = micro_batch(0, 0, 8)
        size = 8 // cut
        given = [
            replace(large, shard=i, tensors={k: v[i * size : (i + 1) * size] for k, v in large.tensors.items()},
                    ids=large.ids[i * size : (i + 1) * size])
            for i in range(cut)
        ]  # fmt: skip
        folder = tmp_path / str(cut)
        folder.mkdir()
        fit(TASK, settings, state, iter([given]), global_batch=8, shards=cut, device=CPU, hooks=Kept(folder))
        optimizer = state.optimizers["g"]
        return torch.cat([slot["exp_avg"].flatten() for slot in optimizer.state.values()])  # 0.1 x gradient

    whole = one_step(1)
    torch.testing.assert_close(one_step(2), whole, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(one_step(4), whole, rtol=1e-4, atol=1e-8)


def test_a_spare_micro_batch_of_weight_zero_changes_nothing(tmp_path: Path) -> None:
    def end(spare: bool) -> torch.Tensor:
        settings = replace(RUN, total_images=32)
        state = build_state(TASK, settings, CPU)
        extra = [MicroBatch(0, SHARDS, {}, np.zeros((0, 3), np.int64), b"", 0.0)] if spare else []
        folder = tmp_path / str(spare)
        folder.mkdir()
        given = (step + extra for step in stream(0))
        fit(TASK, settings, state, given, global_batch=8, shards=SHARDS, device=CPU, hooks=Kept(folder))
        return weights(state)

    assert torch.equal(end(False), end(True))


@dataclass(frozen=True, kw_only=True)
class Exploding:
    """A family whose loss is NaN once `at` images were seen."""

    at: int = 100
    family = "exploding"
    needs = ("lr", "hr")
    specs: Mapping[str, Spec] = field(default_factory=dict)

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(name="g", nets=("net",)),)

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        return {"net": nn.Conv2d(3, 3, 1)}

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        total = nets["net"](batch.tensors["lr"]).square().mean()
        total = total * (float("nan") if batch.images_seen >= self.at else 1.0)
        return Losses(total, {"loss/square": total})

    def shipped(self, nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return dict(nets)


def test_a_loss_that_is_not_finite_stops_the_run_and_reaches_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"before image 128; the last checkpoint is sound"):
        run(folder, task=Exploding())
    assert [c.images_seen for c in checkpoint.checkpoints(str(folder))] == [64]
    for net in checkpoint.load_nets(checkpoint.checkpoints(str(folder))[0], Exploding()).values():
        assert all(torch.isfinite(p).all() for p in net.parameters())


@dataclass(frozen=True, kw_only=True)
class Rotten(Exploding):
    """Finite losses, and weights that are not: what a step that overflows leaves."""

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        net = nets["net"]
        assert isinstance(net, nn.Conv2d)
        assert net.bias is not None
        total = nn.functional.conv2d(batch.tensors["lr"], net.weight).square().mean()
        if batch.images_seen >= self.at:
            net.bias.data.fill_(float("inf"))
        return Losses(total, {"loss/square": total})


def test_weights_that_are_not_finite_reach_no_checkpoint_either(tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        run(tmp_path / "run", task=Rotten(at=120))  # in the very last step before the checkpoint at 128
    assert [c.images_seen for c in checkpoint.checkpoints(str(tmp_path / "run"))] == [64]


@dataclass(frozen=True, kw_only=True)
class TwoTurns(Exploding):
    """Two nets that learn from each other in turn; each loss would also have a gradient for the other."""

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(name="d", nets=("d",)), Turn(name="g", nets=("g",)))

    def build(self, device: torch.device) -> dict[str, nn.Module]:
        return {"d": nn.Conv2d(3, 3, 1), "g": nn.Conv2d(3, 3, 1)}

    def loss(self, turn: str, nets: Mapping[str, nn.Module], batch: Batch) -> Losses:
        score = nets["d"](nets["g"](batch.tensors["lr"])).mean()
        assert all(p.requires_grad == (name == turn) for name in "dg" for p in nets[name].parameters())
        total = score.square() if turn == "d" else (score - 1).square()
        return Losses(total, {f"loss/{turn}": total})


def test_each_turn_steps_its_own_nets_and_freezes_the_others(tmp_path: Path) -> None:
    whole, kept = run(tmp_path / "whole", task=TwoTurns())
    assert {name for name in kept.logged[0][1] if name.startswith("loss/")} == {"loss/d", "loss/g"}
    assert kept.logged[-1][1]["loss/g"] < kept.logged[0][1]["loss/g"]
    resumed, _ = run(tmp_path / "resumed", task=TwoTurns(), resume=kept.checkpoints[128])
    assert torch.equal(weights(whole), weights(resumed))


def test_a_lost_micro_batch_is_an_error_not_a_smaller_batch(tmp_path: Path) -> None:
    state = build_state(TASK, RUN, CPU)
    given = (step[:-1] if step[0].step == 5 else step for step in stream(0))
    with pytest.raises(IntegrityError, match="must hold each of the 4 micro-batches once"):
        fit(TASK, RUN, state, given, global_batch=8, shards=SHARDS, device=CPU, hooks=Kept(tmp_path))


def test_damaged_bytes_are_noticed_where_asked(tmp_path: Path) -> None:
    damaged = micro_batch(0, 0)
    damaged.tensors["hr"][0, 0, 0, 0] ^= 1
    given = [[damaged, *(micro_batch(0, shard) for shard in range(1, 4))]]
    settings = replace(RUN, total_images=8, verify_batches=True)
    state = build_state(TASK, settings, CPU)
    with pytest.raises(IntegrityError, match="micro-batch 0 of step 0"):
        fit(TASK, settings, state, iter(given), global_batch=8, shards=4, device=CPU, hooks=Kept(tmp_path))


def test_the_chain_is_about_content_and_order(tmp_path: Path) -> None:
    def chain(swap: bool) -> str:
        settings = replace(RUN, total_images=16)
        state = build_state(TASK, settings, CPU)
        sha = [[micro_batch(s, v).sha256 for v in range(SHARDS)] for s in range(2)]
        order = [1, 0] if swap else [0, 1]
        given = ([replace(micro_batch(s, v), sha256=sha[order[s]][v]) for v in range(SHARDS)] for s in range(2))
        folder = tmp_path / str(swap)
        folder.mkdir()
        fit(TASK, settings, state, given, global_batch=8, shards=SHARDS, device=CPU, hooks=Kept(folder))
        return state.chain

    assert chain(False) != chain(True)


def test_bf16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    state, hooks = run(tmp_path / "run", replace(RUN, precision="bf16"))
    losses = [m["loss/l1"] for _, m in hooks.logged]
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in state.nets["net"].parameters()} == {torch.float32}


def test_a_missing_compiler_is_said_aloud_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "compiler_missing", lambda device: "no g++")
    monkeypatch.setattr(loop.log, "propagate", True)
    state, _ = run(tmp_path / "run", replace(RUN, total_images=64, compile=True))
    assert "no compiler here (no g++); training without it" in caplog.text
    plain, _ = run(tmp_path / "plain", replace(RUN, total_images=64))
    assert torch.equal(weights(state), weights(plain))


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_a_compiled_run_trains_and_its_checkpoints_are_plain(tmp_path: Path) -> None:
    settings = replace(RUN, compile=True)
    compiled, kept = run(tmp_path / "compiled", settings)
    plain, _ = run(tmp_path / "plain")
    assert "OptimizedModule" in type(compiled.nets["net"]).__name__
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=0.1, atol=0.02)
    resumed, _ = run(tmp_path / "resumed", RUN, resume=kept.checkpoints[128])  # on a machine without a compiler
    torch.testing.assert_close(weights(resumed), weights(plain), rtol=0.1, atol=0.02)


def test_where_a_compiler_is_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    assert bool(loop.compiler_missing(CPU)) == (shutil.which("g++") is None)
    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/g++",))
    assert loop.compiler_missing(CPU)


def test_schedule_is_a_pure_function_of_images_seen() -> None:
    cosine = Optimizer(learning_rate=1.0, warmup_images=99, decay="cosine", final_fraction=0.1)
    values = [learning_rate(cosine, i, 1099) for i in (0, 49, 99, 599, 1099, 5000)]
    assert values == pytest.approx([0.01, 0.5, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate(dataclasses.replace(cosine, decay="constant"), 900, 1099) == 1.0
