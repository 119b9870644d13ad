"""Losses against other implementations, hand-made values and what they are for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from rayscale import losses
from rayscale.errors import ConfigError

KINDS = ("non_saturating", "relativistic", "hinge", "minmax")


def pictures(seed: int, n: int = 2, px: int = 24) -> Tensor:
    return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_equal_pictures_lose_nothing_and_others_something(a: int, b: int) -> None:
    one, other = pictures(a, px=12), pictures(b, px=12)
    for loss in (losses.l1, losses.mse, losses.charbonnier, losses.fft, losses.ssim):
        assert loss(one, one).item() == pytest.approx(0.0, abs=1e-6)
        if a != b:
            assert loss(one, other) > 0.01
        assert loss(one, other).item() == pytest.approx(loss(other, one).item(), rel=1e-5, abs=1e-7)


def test_charbonnier_is_l1_far_away_and_smooth_near() -> None:
    zero, far = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert losses.charbonnier(zero, far).item() == pytest.approx(1.0, abs=2e-3)
    near = torch.full((1, 1, 2, 2), 1e-5)
    assert losses.charbonnier(zero, near) < 0.1 * losses.l1(zero, near)


def test_ssim_is_scikit_images() -> None:
    a, b = pictures(1), (pictures(1) + 0.1 * pictures(2)).clamp(0, 1)
    expected = []
    for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):
        for plane, other in zip(x, y, strict=True):
            _, full = structural_similarity(
                plane, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, full=True
            )
            expected.append(full[5:-5, 5:-5].mean())
    found = 1 - losses.ssim(a, b).item()
    assert found == pytest.approx(np.mean(expected), abs=2e-5)
    assert found != pytest.approx(1 - losses.ssim(a, b.flip(-1)).item(), abs=1e-2), "negative control"


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ConfigError, match=r"task\.ssim_weight=\(10, 12\): SSIM needs sides of 11 px"):
        losses.ssim(torch.rand(1, 3, 10, 12), torch.rand(1, 3, 10, 12))


def test_ssim_and_gram_are_float32_under_autocast() -> None:
    a, b = pictures(1), pictures(2)
    expected = losses.ssim(a, b), losses.gram(a)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.ssim(a, b), expected[0])
        assert torch.equal(losses.gram(a), expected[1])
        flat = a.flatten(2)
        assert not torch.equal((flat @ flat.mT).float() / flat.shape[2], expected[1]), "negative control"


def test_fft_weighs_every_frequency_alike() -> None:
    """Of two errors with the same L1, the one of a single frequency stands out less than a point's many."""
    x = torch.arange(16.0)
    wave = torch.cos(2 * math.pi * 2 * x / 16).expand(1, 1, 16, 16)
    point = torch.zeros(1, 1, 16, 16)
    point[..., 3, 5] = 1.0
    zero = torch.zeros(1, 1, 16, 16)
    assert losses.fft(wave, zero).item() == pytest.approx(16 / 2 / (2 * 9 * 16), abs=1e-6)  # one of 9 x 16 half-planes
    ratio = losses.fft(point, zero) / losses.l1(point, zero)
    assert ratio > 10 * losses.fft(wave, zero) / losses.l1(wave, zero)


def test_gram_is_the_mean_product_of_channels() -> None:
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])
    torch.testing.assert_close(losses.gram(maps), torch.tensor([[[2.5, 1.5], [1.5, 4.5]]]))


def test_style_knows_no_places_and_perceptual_does() -> None:
    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
    moved = [m.roll((3, 1), (2, 3)) for m in maps]
    assert losses.style(moved, maps).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.perceptual(moved, maps) > 0.5
    assert losses.style([2 * m for m in maps], maps).item() == pytest.approx(3.0, rel=1e-3)


@given(st.floats(1e-2, 1e3), st.floats(1e-2, 1e3))
@settings(max_examples=20, deadline=None)
def test_layers_of_any_size_weigh_alike(first: float, second: float) -> None:
    """A net whose layers have other magnitudes needs no other weight."""
    maps, others = ([pictures(s) for s in seeds] for seeds in ((1, 2), (3, 4)))
    scaled = [[m * k for m, k in zip(group, (first, second), strict=True)] for group in (maps, others)]
    assert losses.perceptual(*scaled).item() == pytest.approx(losses.perceptual(maps, others).item(), rel=1e-3)


def test_a_sample_is_measured_against_its_own_target() -> None:
    a, b = pictures(1), pictures(2) * torch.tensor([1.0, 0.1])[:, None, None, None]
    alone = [losses.perceptual([a[i : i + 1]], [b[i : i + 1]]) for i in range(2)]
    torch.testing.assert_close(losses.perceptual([a], [b]), torch.stack(alone).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_nets_pull_against_each_other(kind: losses.Adversarial) -> None:
    real, fake = (torch.zeros(3, requires_grad=True) for _ in range(2))
    of_real, of_fake = torch.autograd.grad(losses.critic_loss(kind, real, fake), (real, fake))
    assert (of_real < 0).all(), "the critic raises originals"
    assert (of_fake > 0).all(), "and lowers what was made"
    (pulled,) = torch.autograd.grad(losses.generator_loss(kind, real.detach(), fake), fake)
    assert (pulled < 0).all(), "the generator raises what it made"


def test_relativistic_pairs_compare_and_others_do_not() -> None:
    real, fake = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    moved = losses.critic_loss("relativistic", real + 7, fake + 7)
    torch.testing.assert_close(moved, losses.critic_loss("relativistic", real, fake))
    for kind in ("non_saturating", "hinge"):
        assert losses.critic_loss(kind, real + 7, fake + 7) != losses.critic_loss(kind, real, fake)


def test_every_loss_has_a_gradient_that_leads_there() -> None:
    target = pictures(5, n=1, px=16)
    for loss in (losses.l1, losses.mse, losses.charbonnier, losses.fft, losses.ssim):
        x = nn.Parameter(pictures(6, n=1, px=16))
        first = loss(x, target)
        optimizer = torch.optim.Adam([x], lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            loss(x, target).backward()
            optimizer.step()
        assert loss(x, target) < 0.5 * first, loss
