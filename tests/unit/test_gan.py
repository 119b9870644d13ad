"""Adversarial families: what noise is drawn, what the two nets are taught, and that a class is listened to."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest, truncnorm
from torch import Tensor, nn

from rayscale import artifact
from rayscale.contract import ModelCard
from rayscale.errors import ConfigError
from rayscale.export import to_onnx
from rayscale.latents import Z_MAX, interpolate, latents, one_hot
from rayscale.losses import Adversarial, critic_loss, generator_loss, gradient_penalty
from rayscale.task import Batch
from rayscale.tasks.gan import Dcgan, Gan, Residual

CPU = torch.device("cpu")
GOLDEN = [-0.4004923, -1.069538, -0.2694864, -0.761709, -1.792257, 0.9226708]
DCGAN = Gan(architecture=Dcgan(features=8, max_features=16), side=8, latent=4, r1_gamma=1.0)
R3GAN = Gan(
    architecture=Residual(features=8, max_features=16, blocks=1),
    side=8, latent=4, adversarial="relativistic", r1_gamma=1.0, r2_gamma=1.0,
)  # fmt: skip
both = pytest.mark.parametrize("task", [DCGAN, R3GAN], ids=lambda task: task.family)


def pictures(task: Gan, count: int = 6, seed: int = 0) -> Tensor:
    shape = (count, 3, task.side, task.side)
    return torch.from_numpy(np.random.default_rng(seed).random(shape, np.float32))


# -- latents


@given(st.integers(-(2**63), 2**64), st.integers(0, 2**40), st.integers(1, 5), st.floats(0.0, Z_MAX))
@settings(max_examples=50, deadline=None)
def test_a_row_of_a_seed_is_the_same_in_any_batch(seed: int, first: int, count: int, truncation: float) -> None:
    together = latents(seed, count, 7, truncation=truncation, first=first)
    alone = [latents(seed, 1, 7, truncation=truncation, first=first + i) for i in range(count)]
    assert np.array_equal(together, np.concatenate(alone))
    assert np.abs(together).max() <= truncation


def test_latents_are_what_they_were() -> None:
    """Golden: who kept a seed keeps the picture, with any numpy."""
    assert latents(7, 2, 3).ravel().tolist() == pytest.approx(GOLDEN, abs=1e-6)


@pytest.mark.parametrize("truncation", [0.5, 1.0, Z_MAX])
def test_latents_are_truncated_normal(truncation: float) -> None:
    drawn = latents(0, 500, 40, truncation=truncation).ravel()
    assert kstest(drawn, truncnorm(-truncation, truncation).cdf).pvalue > 0.01
    assert kstest(drawn, truncnorm(-1.1 * truncation, 1.1 * truncation).cdf).pvalue < (0.01 if truncation < 2 else 1.1)


def test_rows_and_seeds_differ() -> None:
    seeds = [*range(10), 2**63, 2**63 + 1, 2**64 - 1, 2**64 - 2]  # of 64 bits, each one counts
    rows = np.concatenate([latents(seed, 100, 4) for seed in seeds])
    assert len(np.unique(rows)) == rows.size


def test_a_smaller_truncation_moves_every_component_toward_the_mean() -> None:
    wide, middle, none = (latents(3, 10, 16, truncation=t) for t in (2.0, 1.0, 0.0))
    assert (np.abs(middle) < np.abs(wide)).all()
    assert (np.sign(middle) == np.sign(wide)).all()
    assert not none.any()


def test_the_way_between_two_seeds_is_an_arc() -> None:
    a, b = latents(1, 2, 64)
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    way = interpolate(a, b, 9)
    assert np.allclose(way[[0, -1]], [a, b], atol=1e-6)
    assert np.allclose(np.linalg.norm(way, axis=1), np.linalg.norm(a), rtol=1e-3)
    assert np.linalg.norm((a + b) / 2) < 0.8 * np.linalg.norm(a)  # negative control: the chord leaves the shell
    steps = np.linalg.norm(np.diff(way, axis=0), axis=1)
    assert np.allclose(steps, steps[0], rtol=1e-2)


@pytest.mark.parametrize("end", [np.zeros(3), np.ones(3), -np.ones(3)])
def test_ways_that_have_no_arc_are_straight(end: np.ndarray) -> None:
    way = interpolate(np.ones(3, np.float32), end.astype(np.float32), 3)
    assert np.allclose(way[1], (1 + end) / 2)


def test_what_is_outside_is_refused() -> None:
    with pytest.raises(ConfigError, match="truncation="):
        latents(0, 1, 1, truncation=4.1)
    with pytest.raises(ConfigError, match="interpolate"):
        interpolate(np.zeros(3, np.float32), np.zeros(4, np.float32), 3)
    with pytest.raises(ConfigError, match="class=5"):
        one_hot([0, 5], 5)
    assert one_hot([2, 0], 3).tolist() == [[0, 0, 1], [1, 0, 0]]


# -- losses


@pytest.mark.parametrize("kind", ["non_saturating", "relativistic", "hinge", "minmax"])
def test_each_net_is_pushed_its_own_way(kind: Adversarial) -> None:
    real, fake = torch.tensor([0.3, -0.2], requires_grad=True), torch.tensor([0.1, 0.4], requires_grad=True)
    of_real, of_fake = torch.autograd.grad(critic_loss(kind, real, fake), (real, fake))
    assert (of_real < 0).all()
    assert (of_fake > 0).all()
    (of_fake,) = torch.autograd.grad(generator_loss(kind, real.detach(), fake), fake)
    assert (of_fake < 0).all()


def test_only_the_literal_game_stops_teaching_where_the_critic_is_sure() -> None:
    fake = torch.tensor([-10.0], requires_grad=True)
    real = torch.tensor([10.0])
    kinds: tuple[Adversarial, ...] = ("non_saturating", "relativistic", "hinge", "minmax")
    pull = {kind: torch.autograd.grad(generator_loss(kind, real, fake), fake)[0].abs().item() for kind in kinds}
    assert pull.pop("minmax") < 1e-4
    assert min(pull.values()) > 0.99


def test_the_penalty_is_the_squared_gradient_and_teaches_the_critic() -> None:
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    weight = critic[1].weight
    penalty = gradient_penalty(lambda x: critic(x)[:, 0], torch.rand(5, 3, 2, 2))
    assert torch.allclose(penalty, weight.square().sum())
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert torch.allclose(gradient, 2 * weight)


@both
def test_the_penalty_is_float32_in_the_midst_of_bfloat16(task: Gan) -> None:
    critic, images = task.build(CPU)["d"], pictures(task)
    outside = gradient_penalty(critic, images)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradient_penalty(critic, images.bfloat16().float())
        image = images.clone().requires_grad_()
        (rough,) = torch.autograd.grad(critic(image).sum(), image)
    assert inside.dtype == torch.float32
    assert inside.item() == gradient_penalty(critic, images.bfloat16().float()).item()
    assert rough.square().flatten(1).sum(1).mean().item() != outside.item()  # negative control


# -- the task


@pytest.mark.parametrize("side", [28, 32, 48, 64, 128])
@both
def test_every_side_and_class_count_fits(task: Gan, side: int) -> None:
    for classes in (0, 3):
        sized = replace(task, side=side, num_classes=classes)
        nets = sized.build(CPU)
        inputs = [torch.rand(2, *shape) for shape in [(4,), (3,)][: 1 + bool(classes)]]
        with torch.no_grad():
            picture = sized.shipped(nets)[""](*inputs)
            assert nets["d"](picture, *inputs[1:]).shape == (2,)
        assert picture.shape[1:] == sized.specs[""].outputs[0].shape[1:]
        assert 0 <= picture.min() <= picture.max() <= 1


@both
def test_a_turn_moves_its_own_net_only(task: Gan) -> None:
    nets = task.build(CPU)
    for turn, other in (("d", "g"), ("g", "d")):
        nets[turn].requires_grad_(True)
        nets[other].requires_grad_(False)
        losses = task.loss(turn, nets, Batch({"hr": pictures(task)}, 0))
        losses.total.backward()  # type: ignore[no-untyped-call]
        assert any(p.grad is not None and p.grad.any() for p in nets[turn].parameters())
        assert all(p.grad is None for p in nets[other].parameters())
        assert all(np.isfinite(term.item()) for term in losses.terms.values())
        nets[turn].zero_grad()


@both
def test_penalties_of_a_share_are_those_of_the_first_pictures(task: Gan) -> None:
    task = replace(task, augment=())
    nets, images = task.build(CPU), pictures(task)
    for name, p in nets["d"].named_parameters():  # the blocks of a fresh residual critic are silent
        nn.init.normal_(p, std=0.5) if "leave" in name else None
    part = replace(task, penalty_share=0.5).loss("d", nets, Batch({"hr": images}, 0)).terms["penalty/r1"]
    first, all_of_them = (task.loss("d", nets, Batch({"hr": x}, 0)).terms["penalty/r1"] for x in (images[:3], images))
    assert part == first
    assert part != all_of_them


CLASSES = {"num_classes": 2, "augment": (), "r1_gamma": 0.1}


@pytest.mark.parametrize(
    "task",
    [replace(DCGAN, **CLASSES), pytest.param(replace(R3GAN, r2_gamma=0.1, **CLASSES), marks=pytest.mark.long)],
)
def test_a_class_is_learnt_from_its_pictures(task: Gan) -> None:
    assert redness(task, told=True) > 0.4


@pytest.mark.long
def test_a_class_is_not_learnt_with_the_labels_torn_off() -> None:
    """Negative control."""
    assert abs(redness(replace(DCGAN, **CLASSES), told=False)) < 0.15


def redness(task: Gan, told: bool) -> float:
    """How much more red than blue class 0 is than class 1, after some steps with red pictures of 0, blue ones of 1."""
    torch.manual_seed(0)
    nets = task.build(CPU)
    optimizers = {t.name: torch.optim.Adam(nets[t.name].parameters(), 1e-2, (0.0, 0.99)) for t in task.turns}
    label = torch.arange(16) % 2
    hr = torch.zeros(16, 3, task.side, task.side)
    hr[label == 0, 0], hr[label == 1, 2] = 1.0, 1.0
    for _ in range(60):
        given = label if told else torch.randint(0, 2, (16,))
        for turn, optimizer in optimizers.items():
            optimizer.zero_grad()
            task.loss(turn, nets, Batch({"hr": hr, "label": given}, 0)).total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    nets["ema"] = nets["g"]
    show = partial(task.shipped(nets)[""], torch.from_numpy(latents(0, 32, task.latent)))
    with torch.no_grad():
        red, blue = (show(torch.from_numpy(one_hot([c] * 32, 2))).mean((0, 2, 3)) for c in (0, 1))
    return float((red[0] - red[2]) - (blue[0] - blue[2])) / 2


def test_a_seed_and_a_class_are_a_picture_in_any_batch(tmp_path: Path) -> None:
    """Through the artifact, to the bit."""
    task = replace(R3GAN, num_classes=3)
    torch.manual_seed(0)
    card = ModelCard(family=task.family, spec=task.specs[""], licence="CC0-1.0")
    to_onnx(task.shipped(task.build(CPU))[""], card, tmp_path / "model")
    session = artifact.load(tmp_path / "model")

    def show(seed: int, count: int, label: int, first: int = 0) -> NDArray[np.float32]:
        given = {"z": latents(seed, count, task.latent, first=first), "label": one_hot([label] * count, 3)}
        return session.run(given)["image_out"]

    batch = show(5, 4, 2)
    assert all(np.array_equal(show(5, 1, 2, first=i)[0], batch[i]) for i in range(4))
    assert not np.array_equal(show(5, 1, 1)[0], batch[0])  # another class
    assert not np.array_equal(show(6, 1, 2)[0], batch[0])  # another seed


def test_the_literal_loss_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rayscale"):
        DCGAN.build(CPU)
        assert not caplog.records
        replace(DCGAN, adversarial="minmax").build(CPU)
        assert "minmax" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [("side", 36), ("side", 4), ("latent", 0), ("num_classes", 1), ("num_classes", -1), ("r1_gamma", -1.0),
     ("r2_gamma", -1.0), ("penalty_share", 0.0), ("penalty_share", 1.5), ("augment", ("blur",))],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"task.{field}="):
        replace(DCGAN, **{field: value})


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="no effect"):
        Gan(penalty_share=0.5)
    with pytest.raises(ConfigError, match="groups"):
        Dcgan(features=12)
    with pytest.raises(ConfigError, match="group_width"):
        Residual(features=12)
    with pytest.raises(ConfigError, match="blocks=0"):
        Residual(blocks=0)
