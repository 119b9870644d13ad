"""The VAE's bound: a likelihood that sums to one, bounds in their order, sums and not means; and its baselines."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from rayscale import losses
from rayscale.errors import ConfigError
from rayscale.task import Batch, Judging
from rayscale.tasks.compact import Compact
from rayscale.tasks.vae import (
    Vae,
    VaeNet,
    bits_per_dim,
    bound_nats,
    histogram_bits_per_dim,
    importance_bound_nats,
    mean_image_psnr,
)

CPU = torch.device("cpu")
TASK = Vae(side_px=8, features=8, latent=4)


def pictures(n: int = 4, side: int = 8, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, side, side)).astype(np.float32) / 255)


def net_of(task: Vae = TASK, seed: int = 0) -> VaeNet:
    torch.manual_seed(seed)
    net = task.build(CPU)["net"]
    assert isinstance(net, VaeNet)
    for parameter in net.parameters():  # so that the zeros of fresh blocks hide nothing
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval()


@given(mean=st.floats(-0.5, 1.5), log_scale=st.floats(-7, 1))
@settings(max_examples=40, deadline=None)
def test_the_logistic_is_a_probability_of_the_256_values(mean: float, log_scale: float) -> None:
    every = (torch.arange(256) / 255)[:, None]
    at = torch.tensor([mean]).expand(256, 1), torch.tensor([log_scale]).expand(256, 1)
    nll = losses.discretised_logistic_nll(every, *at)
    assert (nll >= 0).all()
    assert torch.isfinite(nll).all()
    assert nll.double().neg().exp().sum().item() == pytest.approx(1.0, abs=1e-4)


def test_the_logistic_is_exact_where_the_difference_of_two_sigmoids_is_none() -> None:
    """Against float64; the control is the textbook formula in float32, which loses the tail."""
    pixel, mean, log_scale = torch.tensor([[0.5019608]]), torch.tensor([[0.1]]), torch.tensor([[-4.5]])
    got = losses.discretised_logistic_nll(pixel, mean, log_scale)
    p, m, s = (t.double() for t in (pixel, mean, log_scale))
    upper, lower = (p - m + 0.5 / 255) / s.exp(), (p - m - 0.5 / 255) / s.exp()
    assert got.item() == pytest.approx(-torch.log(torch.sigmoid(-lower) - torch.sigmoid(-upper)).item(), rel=1e-5)
    textbook = torch.sigmoid(upper.float()) - torch.sigmoid(lower.float())
    assert textbook.item() == 0


def test_the_logistics_gradient_is_finite_everywhere() -> None:
    pixel = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.2]])
    mean = torch.tensor([[50.0, -50.0, -50.0, 50.0, 9.0]], requires_grad=True)
    log_scale = torch.full((1, 5), -7.0, requires_grad=True)
    losses.discretised_logistic_nll(pixel, mean, log_scale).sum().backward()
    for leaf in (mean, log_scale):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
    assert mean.grad is not None
    assert (mean.grad[0, [0, 4]] > 0).all()
    assert mean.grad[0, 1] < 0


def test_kl_and_gaussian_are_those_of_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, log_variance, x = (torch.randn(5, 7, generator=rng) for _ in range(3))
    q, prior = (
        Independent(Normal(m, s), 1)
        for m, s in ((mean, (0.5 * log_variance).exp()), (torch.zeros_like(mean), torch.ones_like(mean)))
    )
    assert torch.allclose(losses.kl_to_standard_normal(mean, log_variance), kl_divergence(q, prior), atol=1e-5)
    assert torch.allclose(losses.gaussian_nll(x, mean, 0.5 * log_variance), -q.log_prob(x), atol=1e-4)


@pytest.mark.parametrize("likelihood", ["logistic", "gaussian"])
def test_the_loss_is_the_bound_summed_over_a_picture(likelihood: str) -> None:
    """And a batch's is the mean over its pictures."""
    task = replace(TASK, likelihood=likelihood)
    net, x = net_of(task), pictures()
    torch.manual_seed(1)
    given = task.loss("vae", {"net": net}, Batch({"hr": x}, 0))
    torch.manual_seed(1)
    bound = bound_nats(task, net, x)
    assert bound.shape == (4,)
    assert given.terms["loss/bound_nats"].item() == pytest.approx(bound.mean().item(), rel=1e-5)
    assert given.total.item() == pytest.approx(bound.mean().item() / 192, rel=1e-5)
    assert given.terms["bits_per_dim"].item() == pytest.approx(bound.mean().item() / math.log(2) / 192, rel=1e-5)


def test_beta_weighs_the_kl_and_warms_up_with_the_images() -> None:
    task = replace(TASK, beta=0.5, beta_warmup_images=99)
    assert [task.beta_at(seen) for seen in (0, 49, 99, 10**9)] == [0.005, 0.25, 0.5, 0.5]
    net = net_of()
    torch.manual_seed(1)
    given = task.loss("vae", {"net": net}, Batch({"hr": pictures()}, 49))
    parts = [given.terms[f"loss/{name}_nats"].item() for name in ("reconstruction", "kl", "bound")]
    assert given.total.item() == pytest.approx((parts[0] + 0.25 * parts[1]) / 192, rel=1e-5)
    assert parts[2] == pytest.approx(parts[0] + parts[1], rel=1e-6)  # the bound knows no beta


def test_the_bounds_bound_what_quadrature_finds() -> None:
    """d = 1: -log P is an integral over a line. It lies below the importance bound, and that below the other."""
    task = replace(TASK, latent=1)
    net, x = net_of(task, 3), pictures(2, seed=3)
    z = torch.linspace(-8, 8, 4001)
    with torch.no_grad():
        likelihood = net.decode(z[:, None])
        log_prior = -losses.gaussian_nll(z[:, None], torch.zeros(1), torch.zeros(1))
        exact = torch.stack(
            [
                -torch.logsumexp(log_prior - task.nll(one.expand(4001, 3, 8, 8), likelihood), 0) - math.log(16 / 4000)
                for one in x
            ]
        )
    torch.manual_seed(0)
    bound = torch.stack([bound_nats(task, net, x) for _ in range(200)]).mean(0) - exact
    tighter = [
        torch.stack([importance_bound_nats(task, net, x, k) for _ in range(200 // k)]).mean(0) - exact for k in (4, 200)
    ]
    assert (bound > 1.0).all()  # the control: there is something to tighten
    assert (bound > tighter[0]).all()
    assert (tighter[1].abs() < 0.2 * bound).all()


def test_held_out_pictures_are_judged_beside_histograms_and_training_is_not_disturbed() -> None:
    nets = {"ema": net_of()}
    learned = (pictures(8, seed=1).movedim(1, -1).numpy() * 255).round().astype(np.uint8)
    before = torch.get_rng_state()
    found = TASK.held_out(nets, Batch({"hr": pictures()}, 0), learned)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == TASK.held_out(nets, Batch({"hr": pictures()}, 0), learned), "the same draws each time"
    assert 0 < found["bits_per_dim_iw16"] < found["bits_per_dim"]
    held_out = (pictures().movedim(1, -1).numpy() * 255).round().astype(np.uint8)
    assert found["bits_per_dim_histogram"] == histogram_bits_per_dim(learned, held_out)
    assert isinstance(TASK, Judging)
    assert not isinstance(Compact(), Judging)


def test_dequantised_gaussians_bound_the_256_values() -> None:
    """A density over k + noise, so that -log P of 8-bit values is bounded: the masses sum to at most one."""
    task = replace(TASK, likelihood="gaussian", side_px=8)
    torch.manual_seed(0)
    every = (torch.arange(256) / 255)[:, None, None, None].expand(256, 3, 8, 8)
    for log_scale in (-3.0, -5.5):
        flat = torch.full((256, 3, 8, 8), 0.4), torch.full((256, 3, 8, 8), log_scale)
        nats = torch.stack([task.nll(every, flat) for _ in range(20)]).mean(0) / 192  # type: ignore[arg-type]
        assert nats.neg().exp().sum().item() <= 1.001
        assert nats.neg().exp().sum().item() > 0.9


@given(seed=st.integers(0, 99), side=st.sampled_from([8, 16]), blocks=st.integers(1, 2))
@settings(max_examples=5, deadline=None)
def test_what_ships_has_the_cards_shapes_and_ranges(seed: int, side: int, blocks: int) -> None:
    task = Vae(side_px=side, features=8, latent=3, blocks=blocks)
    nets = task.build(CPU)
    for function, module in task.shipped(nets).items():
        spec = task.specs[function]
        rng = np.random.default_rng(seed)
        inputs = [
            torch.from_numpy(
                rng.uniform(t.low, t.high, [5 if a == "n" else int(a) for a in t.shape]).astype(np.float32)
            )
            for t in spec.inputs
        ]
        found = module(*inputs)
        for tensor, value in zip(spec.outputs, found if isinstance(found, tuple) else (found,), strict=True):
            assert value.shape == tuple(5 if a == "n" else a for a in tensor.shape)
            assert tensor.low <= value.min()
            assert value.max() <= tensor.high


def test_histograms_know_values_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    coin = rng.integers(0, 2, (400, 4, 4, 3)).astype(np.uint8) * 255
    assert histogram_bits_per_dim(coin, coin) == pytest.approx(1.0, abs=0.05)
    noise = rng.integers(0, 256, (400, 4, 4, 3)).astype(np.uint8)
    assert histogram_bits_per_dim(noise, noise, by_place=False) == pytest.approx(8.0, abs=0.05)
    unseen = histogram_bits_per_dim(coin, noise)
    assert 8 < unseen < 20  # finite, and worse than knowing nothing
    still = np.broadcast_to(rng.integers(0, 256, (1, 4, 4, 3)), (400, 4, 4, 3)).astype(np.uint8)
    assert histogram_bits_per_dim(still, still) < 0.05
    assert histogram_bits_per_dim(still, still, by_place=False) > 3


def test_the_mean_image_is_a_reconstruction_like_others() -> None:
    train = np.full((3, 4, 4, 3), 100, np.uint8)
    held_out = np.stack([np.full((4, 4, 3), 110, np.uint8), np.full((4, 4, 3), 200, np.uint8)])
    expected = np.mean([20 * math.log10(255 / 10), 20 * math.log10(255 / 100)])
    assert mean_image_psnr(train, held_out) == pytest.approx(expected)


def test_eight_bits_of_one_value_are_eight_bits_per_dim() -> None:
    assert bits_per_dim(torch.tensor(math.log(256.0) * 12), 12).item() == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"side_px": 48}, "task.side_px=48"),
        ({"features": 12}, "multiple of 8"),
        ({"latent": 0}, "task.latent=0"),
        ({"beta": 0.0}, "task.beta=0.0"),
        ({"beta_warmup_images": -1}, "task.beta_warmup_images=-1"),
    ],
)
def test_wrong_settings_are_told(setting: dict[str, float], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Vae(**setting)  # type: ignore[arg-type]


def test_pictures_of_another_side_are_told() -> None:
    with pytest.raises(ConfigError, match=r"task.side_px=8: pictures are \(16, 16\)"):
        TASK.loss("vae", {"net": net_of()}, Batch({"hr": pictures(side=16)}, 0))
