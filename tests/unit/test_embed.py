"""The embedding: losses against their definitions, one micro-batch alone, vectors of unit length from any picture."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from rayscale import losses
from rayscale.errors import ConfigError
from rayscale.task import Batch
from rayscale.tasks.embed import Embed

CPU = torch.device("cpu")
TASK = Embed(features=8, levels=2, head=8)


def pictures(n: int = 6, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, 3, height, width), np.float32))


def vectors(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng), torch.randn(n, d, generator=rng)


@given(n=st.integers(2, 6), seed=st.integers(0, 99), temperature=st.floats(0.1, 2.0))
@settings(max_examples=20, deadline=None)
def test_nt_xent_is_the_papers_sum(n: int, seed: int, temperature: float) -> None:
    """Algorithm 1 of arXiv:2002.05709, literally; the views in either order."""
    a, b = (normalize(v, dim=1) for v in vectors(n, 5, seed))
    z = torch.stack([a, b], 1).flatten(0, 1).double().numpy()  # 2k and 2k + 1 are one picture's
    similar = np.exp(z @ z.T / temperature)
    total = 0.0
    for i in range(2 * n):
        total -= math.log(similar[i, i ^ 1] / (similar[i].sum() - similar[i, i]))
    assert losses.nt_xent(a, b, temperature).item() == pytest.approx(total / (2 * n), rel=1e-4)
    assert losses.nt_xent(b, a, temperature).item() == pytest.approx(total / (2 * n), rel=1e-4)


def test_nt_xent_is_low_where_partners_meet_and_high_where_all_do() -> None:
    apart = torch.eye(8)
    together = torch.ones(8, 8) / math.sqrt(8)
    assert losses.nt_xent(apart, apart, 0.1).item() < 1e-2
    assert losses.nt_xent(together, together, 0.1).item() == pytest.approx(math.log(15), rel=1e-5)
    assert losses.nt_xent(apart, apart.roll(1, 0), 0.1).item() > 5


@given(labels=st.lists(st.integers(0, 2), min_size=2, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_supervised_contrast_is_the_papers_sum(labels: list[int], seed: int) -> None:
    """Equation 2 of arXiv:2004.11362, literally."""
    a, b = (normalize(v, dim=1) for v in vectors(len(labels), 5, seed))
    z, y = torch.cat([a, b]).double().numpy(), labels * 2
    similar = np.exp(z @ z.T / 0.3)
    total = 0.0
    for i in range(len(y)):
        others = [j for j in range(len(y)) if j != i]
        partners = [j for j in others if y[j] == y[i]]
        total -= sum(math.log(similar[i, p] / similar[i, others].sum()) for p in partners) / len(partners)
    found = losses.supervised_contrast(a, b, torch.tensor(labels), 0.3)
    assert found.item() == pytest.approx(total / len(y), rel=1e-4)


def test_supervised_contrast_of_unlike_labels_is_nt_xent() -> None:
    a, b = (normalize(v, dim=1) for v in vectors(6, 5))
    assert losses.supervised_contrast(a, b, torch.arange(6), 0.2).item() == pytest.approx(
        losses.nt_xent(a, b, 0.2).item(), rel=1e-5
    )
    assert losses.supervised_contrast(a, b, torch.zeros(6).long(), 0.2) != losses.nt_xent(a, b, 0.2)


@given(n=st.integers(3, 9), d=st.integers(2, 6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_vicreg_is_the_papers_three_terms(n: int, d: int, seed: int) -> None:
    """Algorithm 1 of arXiv:2105.04906, with numpy's covariance."""
    a, b = vectors(n, d, seed)
    expected = 25 * np.square((a - b).numpy()).mean()
    for views in (a.numpy(), b.numpy()):
        covariance = np.cov(views.T)
        expected += 25 * 0.5 * np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
        expected += np.square(covariance - np.diag(np.diag(covariance))).sum() / d
    assert losses.vicreg(a, b).item() == pytest.approx(expected, rel=1e-3)


def test_vicreg_punishes_collapse() -> None:
    """Views that agree because all vectors are one, against views that agree and vary."""
    a, _ = vectors(64, 4)
    assert losses.vicreg(a * 0, a * 0).item() == pytest.approx(25 * 0.99, rel=1e-3)
    assert losses.vicreg(a, a).item() < 3


@pytest.mark.parametrize("objective", ["simclr", "vicreg", "supcon"])
def test_the_loss_has_two_views_of_each_picture_and_finite_gradients(objective: str) -> None:
    task = replace(TASK, objective=objective)
    torch.manual_seed(0)
    nets = task.build(CPU)
    torch.manual_seed(1)
    given = {"hr": pictures(), "label": torch.tensor([0, 1, 0, 2, 1, 0])}
    first = task.loss("embed", nets, Batch(given, 0))
    torch.manual_seed(2)
    assert task.loss("embed", nets, Batch(given, 0)).total.item() != first.total.item()
    torch.manual_seed(1)
    assert task.loss("embed", nets, Batch(given, 10**6)).total.item() == first.total.item()
    first.total.backward()
    for parameter in nets["net"].parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
    one_colour = torch.zeros(4, 3, 16, 16)  # all vectors alike: the loss of a net that knows nothing
    assert torch.isfinite(task.loss("embed", nets, Batch({"hr": one_colour, "label": torch.zeros(4).long()}, 0)).total)


@given(height=st.integers(1, 40), width=st.integers(1, 40), n=st.integers(2, 5))
@settings(max_examples=10, deadline=None)
def test_vectors_have_unit_length_for_any_picture(height: int, width: int, n: int) -> None:
    torch.manual_seed(0)
    module = TASK.shipped(TASK.build(CPU))[""]
    found = module(pictures(n, height, width))
    assert found.shape == (n, TASK.size)
    assert torch.allclose(found.norm(dim=1), torch.ones(n), atol=1e-5)


def test_what_ships_is_the_average_before_the_head() -> None:
    nets = TASK.build(CPU)
    with torch.no_grad():
        for parameter in nets["ema"].backbone.parameters():  # type: ignore[union-attr]
            parameter += 0.1
    x = pictures()
    expected = normalize(nets["ema"].backbone(x), dim=1)  # type: ignore[operator, union-attr]
    found = TASK.shipped(nets)[""](x)
    assert torch.allclose(found, expected, atol=1e-6)
    other = normalize(nets["net"].backbone(x), dim=1)  # type: ignore[operator, union-attr]
    assert not torch.allclose(found, other, atol=1e-3)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"features": 12}, "multiple of 8"),
        ({"levels": 0}, "task.levels=0"),
        ({"temperature": 0.0}, "task.temperature=0.0"),
        ({"crop_area": (0.5, 0.2)}, "two shares"),
        ({"jitter": 1.5}, "task.jitter=1.5"),
        ({"gray_chance": -0.1}, "task.gray_chance=-0.1"),
    ],
)
def test_wrong_settings_are_told(setting: dict[str, float], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Embed(**setting)  # type: ignore[arg-type]


def test_one_picture_cannot_be_told_from_others() -> None:
    with pytest.raises(ConfigError, match=r"data.micro_batch=1"):
        TASK.loss("embed", TASK.build(CPU), Batch({"hr": pictures(1)}, 0))
